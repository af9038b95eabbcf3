"""Measurements that back the figures in README.md and RESULTS.md, one command each."""
