"""A stand-in for the command line in tests of comparisons: fits that are not run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks._runs import RunFailed

Config = dict[str, Any]


class FakeFits:
    """Stands for the command line: every fit leaves a run folder, unless the method is to fail or to be interrupted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, list[list[str]]()
        self.fails: set[str] = set()
        self.interrupt_after: int | None = None
        self.accuracy = {"basis": 0.9, "finetune": 0.95}

    def __call__(self, words: list[str], log: Path, *, tick: Any, handles: Sequence[int] = ()) -> str:
        self.calls.append(words)
        method = Path(words[2]).stem if words[0] == "fit" else "finetune"
        if f"trial:{method}" in self.fails and "--trainer.fast_dev_run" in words:
            raise RunFailed("bsdp fit: error: no graph")
        if "--trainer.fast_dev_run" in words:
            return ""
        if self.interrupt_after is not None and len(self.fits()) > self.interrupt_after:
            raise KeyboardInterrupt
        if method in self.fails:
            raise RunFailed("bsdp fit: error: it broke")
        return self.fit(words, method) if words[0] == "fit" else self.test(words)

    def fits(self) -> list[tuple[str, str]]:
        """Method and seed of every fit so far."""
        return [(Path(w[2]).stem, w[4]) for w in self.calls if w[0] == "fit" and w[3] == "--seed_everything"]

    def fit(self, words: list[str], method: str) -> str:
        config = yaml.safe_load(Path(words[2]).read_text())
        root = self.folder / words[6]
        run = root / f"version_{len(list(root.glob('version_*')))}"
        (run / "checkpoints").mkdir(parents=True)
        for name in ("last.ckpt", "epoch=1-step=2.ckpt"):
            (run / "checkpoints" / name).touch()
        last = config["trainer"]["max_epochs"] - 1
        (run / "metrics.csv").write_text(f"epoch,val_accuracy\n0,0.1\n,\n{last},0.2\n")
        if method != "finetune" and not method.endswith(".0"):
            (run / "summary.json").write_text(json.dumps(self.summary(method)))
        return f"...\nRun folder: {run}\n"

    def summary(self, method: str) -> Config:
        sizes = {"params_original": 100, "params_pruned": 30, "macs_original": 200, "macs_pruned": 80}
        accuracies = {"accuracy_reference": 0.92, "accuracy_pruned": self.accuracy.get(method, 0.9)}
        accuracies |= {"validation_reference": 0.89, "validation_pruned": 0.88}
        return sizes | accuracies | {"latency_ms_original": 2.0, "latency_ms_pruned": None}

    def test(self, words: list[str]) -> str:
        folder = self.folder / words[6] / "test" / f"version_{len(self.calls)}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"test_accuracy\n{self.accuracy['finetune']}\n")
        return ""
