"""Every piece in configs/data enrols itself."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

import bsdp.datamodules

FOLDER = Path(bsdp.datamodules.__file__).parents[1] / "configs" / "data"
PIECES = sorted(FOLDER.glob("*.yaml"))
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")

SHARED = {"image_size", "batch_size", "num_workers", "val_fraction", "augment"}


class Model(LightningModule):
    pass


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide pytest's own words from the command line that is under test."""
    monkeypatch.setattr("sys.argv", ["bsdp"])
    # Lightning's command line still calls what newer versions of jsonargparse have renamed.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def composed(*pieces: Path, arguments: tuple[str, ...] = ()) -> LightningDataModule:
    """Build the data module from pieces the way the command line does."""
    configs = [word for piece in pieces for word in ("--config", str(piece))]
    return LightningCLI(
        Model, LightningDataModule, subclass_mode_data=True, save_config_callback=None,
        trainer_defaults={"accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        seed_everything_default=False, run=False, args=[*configs, *arguments],
    ).datamodule  # fmt: skip


def test_there_is_a_piece_for_every_module() -> None:
    classes = {yaml.safe_load(piece.read_text())["data"]["class_path"].rpartition(".")[2] for piece in PIECES}
    without = {"ImageDataModule", "ConditionalSourceDataModule"}  # the base, and one that is made of two others
    assert classes == set(bsdp.datamodules.__all__) - without


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: piece.stem)
def test_piece_replaces_another_piece_whole(piece: Path) -> None:
    wanted = yaml.safe_load(piece.read_text())["data"]
    other = FOLDER / ("digits.yaml" if piece.stem == "caltech20" else "caltech20.yaml")
    data = composed(other, piece)
    # An argument that both classes have stays from the earlier piece unless the later one sets it.
    assert set(wanted["init_args"]) >= SHARED
    assert type(data) is getattr(bsdp.datamodules, wanted["class_path"].rpartition(".")[2])
    for name, value in wanted["init_args"].items():
        assert getattr(data, {"image_size": "_image_size", "class_names": "_names"}.get(name, name)) == value


def test_single_values_change_on_the_command_line() -> None:
    arguments = ("--data.batch_size", "7", "--data.normalization", "{mean: [0, 0, 0], std: [1, 1, 2]}")
    data = composed(FOLDER / "mnist.yaml", arguments=arguments)
    assert data.batch_size == 7
    assert data.normalization == {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 2.0]}


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: piece.stem)
def test_piece_says_how_it_is_used(piece: Path) -> None:
    head = piece.read_text().splitlines()[:2]
    assert all(line.startswith("# ") for line in head)
    assert f"--config configs/data/{piece.name}" in head[1]
