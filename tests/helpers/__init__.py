"""Small named networks, slow obvious reference versions and tables of cases that several tests share."""
