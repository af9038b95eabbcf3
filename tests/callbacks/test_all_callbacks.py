"""What holds for every public callback."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger

import bsdp.callbacks
from tests.callbacks.callback_settings import SETTINGS, make_callbacks, make_data
from tests.helpers.pruning_runs import Classifier, make_trainer


@pytest.fixture(autouse=True)
def _quiet_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")


def loggers(name: str, folder: Path) -> list[Any]:
    if SETTINGS[name].get("wandb"):
        import wandb

        wandb.finish()  # else the logger would go on with the run before
    made: list[Any] = [CSVLogger(folder, name="runs")]
    return [*made, WandbLogger(save_dir=folder, offline=True)] if SETTINGS[name].get("wandb") else made


def test_every_callback_has_settings() -> None:
    assert set(SETTINGS) == set(bsdp.callbacks.__all__)


@pytest.mark.parametrize("name", bsdp.callbacks.__all__)
def test_arguments_are_plain_documented_and_keyword_only(name: str) -> None:
    callback = getattr(bsdp.callbacks, name)
    hints = typing.get_type_hints(callback.__init__)
    documented = inspect.getdoc(callback) or ""
    for argument in list(inspect.signature(callback.__init__).parameters.values())[1:]:
        assert argument.kind is argument.KEYWORD_ONLY, argument
        assert argument.default is not argument.empty, argument
        assert f"    {argument.name}: " in documented, argument
        allowed = (int, float, str, bool, type(None), list[str])
        kinds = typing.get_args(hints[argument.name]) or (hints[argument.name],)
        for kind in kinds:
            literal = isinstance(kind, str) or typing.get_origin(kind) in (list, typing.Literal)
            assert literal or kind in allowed, argument


@pytest.mark.parametrize("name", bsdp.callbacks.__all__)
def test_order_in_the_trainer_does_not_matter(name: str, tmp_path: Path) -> None:
    results = []
    for i in range(2):
        torch.manual_seed(0)
        callbacks = make_callbacks(name)
        module = Classifier()
        folder = tmp_path / str(i)
        trainer = make_trainer(folder, callbacks[:: -1 if i else 1], logger=loggers(name, folder), max_epochs=2)
        trainer.fit(module, datamodule=make_data(name))
        results.append({key: value.clone() for key, value in module.state_dict().items()})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


@pytest.mark.parametrize("name", bsdp.callbacks.__all__)
def test_fast_dev_run_and_checkpoint_with_plain_values(name: str, tmp_path: Path) -> None:
    module = Classifier()
    trainer = make_trainer(tmp_path, make_callbacks(name), logger=loggers(name, tmp_path), max_epochs=2)
    trainer.fit(module, datamodule=make_data(name))
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    dry = make_trainer(tmp_path, make_callbacks(name), logger=loggers(name, tmp_path), fast_dev_run=True)
    dry.fit(Classifier(), datamodule=make_data(name))
