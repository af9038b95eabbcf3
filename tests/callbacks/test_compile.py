"""Modules under ``torch.compile``: the same results as without, and no end of recompilations."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch._dynamo.utils import counters

import bsdp
from bsdp.callbacks import PruningReport
from tests.helpers.outcomes import ranks, run
from tests.helpers.pruning_runs import Classifier, small_network


def slow(*values: Any) -> list[Any]:
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]


def plain_names(state: Any) -> dict[str, Any]:
    return {name.replace("_orig_mod.", ""): value for name, value in state.items()}


def fit(kind: str, folder: Path, *others: Callback, **options: Any) -> tuple[Any, Any, Any]:
    """Fit the same module compiled in one way or another; "" is not at all."""
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    module = Classifier(spread=options.pop("spread", False))
    model: Any = module
    if kind == "network":
        module.network = torch.compile(module.network, backend="eager")  # type: ignore[assignment]
    elif kind == "network in place":
        module.network.compile(backend="eager")
    elif kind == "module":
        model = torch.compile(module, backend="eager")
    trainer, pruning, _ = run(module, folder, *others, model=model, **options)
    return trainer, pruning, module


@pytest.mark.parametrize(
    ("kind", "importance"),
    [("network", "energy"), *slow(("module", "mean_square"), ("network in place", "energy"), ("module", "energy"))],
)
def test_same_cuts_and_weights_as_without(
    kind: str, importance: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {
        "decomposition": {"metric": "activation"},
        "pruning": {"importance": importance, "rounds": 2, "target": 0.6, "ranking": "importance", "tolerance": 0.9},
        "max_epochs": 3,
    }
    _, expected, reference = fit("", tmp_path, **options)
    with caplog.at_level(logging.WARNING, logger="torch._dynamo"):
        trainer, pruning, module = fit(kind, tmp_path, **options)
    assert counters["stats"]["unique_graphs"] > 3  # it was compiled, and again after the cuts
    assert not [entry for entry in caplog.records if "recompile_limit" in entry.getMessage()]
    assert pruning.record.rounds == expected.record.rounds
    state = plain_names(module.state_dict())
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)
    # what is written is the plain network
    loaded = bsdp.load(small_network, pruning.weights_path)
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(loaded(images), reference.eval()(images), rtol=1e-4, atol=1e-5)
    metrics = trainer.validate(module, datamodule=trainer.datamodule, verbose=False)
    assert 0 <= metrics[0]["val_accuracy"] <= 1


@pytest.mark.parametrize("kind", ["network in place", *slow("network", "module")])
def test_more_structures_than_dynamo_allows_graphs(kind: str, tmp_path: Path) -> None:
    # What Lightning calls per batch may need five graphs in a compiled module, whatever the structure.
    limit = 6 if kind == "module" else 3
    with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        _, pruning, module = fit(kind, tmp_path, pruning={"rounds": limit, "target": 0.7}, max_epochs=limit + 1)
    assert ranks(module) == list(pruning.record.rounds[-1].ranks.values())


@pytest.mark.parametrize("kind", [*slow("network", "network in place", "module")])
def test_report_measures_the_pruned_network(kind: str, tmp_path: Path) -> None:
    reports = [PruningReport(latency_repeats=1) for _ in range(2)]
    for name, report in zip(("", kind), reports, strict=True):
        fit(name, tmp_path, report)
    first, second = (report.summary for report in reports)
    assert first is not None and second is not None and second["latency_ms_pruned"] is not None
    for key in ("macs_original", "macs_pruned", "params_pruned", "file_bytes_pruned", "accuracy_pruned"):
        assert first[key] == pytest.approx(second[key], rel=0.01), key


@pytest.mark.slow
def test_module_that_holds_the_layers_itself(tmp_path: Path) -> None:
    reports = [PruningReport(latency_repeats=1) for _ in range(2)]
    _, expected, _ = fit("", tmp_path, reports[0], spread=True)
    _, pruning, _ = fit("module", tmp_path, reports[1], spread=True)
    assert pruning.record.rounds == expected.record.rounds
    first, second = (report.summary for report in reports)
    assert first is not None and second is not None
    assert first["macs_pruned"] == second["macs_pruned"] and first["notes"] == second["notes"]


def test_backbone_and_trainable_need_not_know_of_the_wrapper(tmp_path: Path) -> None:
    decomposition = {"backbone": "network.0", "include": ["0"], "trainable": ["network.0.2"]}
    _, _, module = fit(
        "network", tmp_path, decomposition=decomposition, pruning={"target": 0.01, "rounds": 1}, max_epochs=2
    )
    assert list(bsdp.named_pairs(module)) == ["network._orig_mod.0.0"]
    assert module.network._orig_mod[0][2].weight.requires_grad
    assert module.network._orig_mod[3].weight.requires_grad
