"""Compare methods that make a trained network smaller without training it: half of its convolutions' parameters go.

    python benchmarks/training_free.py --tasks resnet20,resnet56 --seeds 0,1,2
    python benchmarks/training_free.py --show benchmarks/results/training_free_cifar10.json

The networks are CIFAR-10's own, so nothing is transferred. A seed draws 256 training images without augmentation, and
128 more that `bsdp.compress` holds out; only `ours_taylor` sees labels. The test images are read once per row,
after everything is decided. Rows are added to --output as they are made, and those in it are not repeated. Minutes are
processor time of one thread, the test not counted. CIFAR-10 and the weight files are found through BSDP_DATA.

    svd, svd_hull      singular vectors, the smallest singular values of all layers go; by value, and by value and cost
    energy             bases of the activations, those with the least output energy go
    cap                channels, with compensation in closed form (Xie et al. 2021, `bsdp.compensated_prune`)
    ours               `bsdp.compress` with its defaults
    ours_fit           layers fitted to the original's outputs in any case, not if held-out images say so
    ours_no_NAME       without one ingredient: the metric, the fit to the original's outputs, the scores
    only_NAME          plain SVD and its energy with one of them
    ours_taylor        scores from labels
    ours_recalibrated  batch norms recalibrated in any case
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path = [str(ROOT), *(folder for folder in sys.path if Path(folder).resolve() != ROOT / "benchmarks")]

import bsdp  # noqa: E402
from benchmarks._tables import read_rows, spread, write_rows  # noqa: E402
from bsdp.backbones import build_backbone  # noqa: E402
from bsdp.datamodules import CIFAR10DataModule  # noqa: E402
from bsdp.probing import evaluating  # noqa: E402
from bsdp.stats import count_macs  # noqa: E402

IMAGES, HELD_OUT = 256, 128
TASKS = {
    "resnet20": ("bsdp:resnet20", "default"),
    "resnet56": ("bsdp:resnet56_pad", "cifar10_resnet56.pth"),
    "densenet": ("bsdp:densenet_bc100", "cifar10_densenet_bc100_k12.pth"),
}
TITLES = ("task", "method", "seeds", "before", "accuracy", "parameters kept", "MACs kept", "seconds")


@dataclass(frozen=True)
class Case:
    """What a method gets.

    Attributes:
        network: A copy that it may change.
        images: Calibration images.
        labels: Their classes.
        target: Share of the parameters to remove.
    """

    network: nn.Module
    images: Tensor
    labels: Tensor
    target: float


@dataclass(frozen=True)
class Small:
    """What a method gives: a network, and its size as a share of the original."""

    network: nn.Module
    params_ratio: float
    macs_ratio: float


def by_sigma(case: Case, ranking: str) -> Small:
    """Remove the smallest singular values of the plain SVD."""
    bsdp.decompose(case.network, example_input=case.images[:1])
    cost = bsdp.measure_cost(case.network, case.images[:1], new_bias=False)
    scores = {name: pair.scaling.sigma for name, pair in bsdp.named_pairs(case.network).items()}
    budget = (1.0 - case.target) * cost.original()
    bsdp.prune(case.network, bsdp.select(scores, cost, budget=budget, ranking=ranking, max_layer_ratio=0.999))
    stats = bsdp.describe(case.network, case.images[:1])
    assert stats.macs_kept is not None
    return Small(case.network, stats.params_kept, stats.macs_kept)


def by_compress(case: Case, **options: Any) -> Small:
    """`bsdp.compress`."""
    labels = options.get("allocation") == "taylor"
    data = [(case.images, case.labels)] if labels else case.images
    result = bsdp.compress(case.network, data, target=case.target, images=IMAGES, **options)
    assert result.stats.macs_kept is not None
    return Small(result.model, result.stats.params_kept, result.stats.macs_kept)


def by_cap(case: Case) -> Small:
    """CaP to a target, without a search by accuracy."""
    before = sum(p.numel() for p in case.network.parameters()), count_macs(case.network, case.images[:1])
    seen = torch.split(case.images[:IMAGES], 64)
    bsdp.compensated_prune(case.network, seen, case.images[:1], target=case.target, max_ratio=0.95)
    after = sum(p.numel() for p in case.network.parameters()), count_macs(case.network, case.images[:1])
    return Small(case.network, after[0] / before[0], after[1] / before[1])


_PLAIN: dict[str, Any] = {"metric": "euclidean", "compensate": False, "recalibrate": False, "allocation": "energy"}
METHODS: dict[str, Callable[[Case], Small]] = {
    "svd": lambda case: by_sigma(case, "importance"),
    "svd_hull": lambda case: by_sigma(case, "hull"),
    "cap": by_cap,
    "ours": by_compress,
    "ours_fit": lambda case: by_compress(case, compensate=True),
    "energy": lambda case: by_compress(case, **{**_PLAIN, "metric": "activation"}),
    "ours_no_metric": lambda case: by_compress(case, metric="euclidean"),
    "ours_no_fit": lambda case: by_compress(case, compensate=False),
    "ours_no_scores": lambda case: by_compress(case, allocation="energy"),
    "only_energy": lambda case: by_compress(case, **_PLAIN),
    "only_fit": lambda case: by_compress(case, **{**_PLAIN, "compensate": True}),
    "only_scores": lambda case: by_compress(case, **{**_PLAIN, "allocation": "kl"}),
    "only_recalibrated": lambda case: by_compress(case, **{**_PLAIN, "recalibrate": True}),
    "ours_taylor": lambda case: by_compress(case, allocation="taylor"),
    "ours_recalibrated": lambda case: by_compress(case, recalibrate=True),
}


def main(words: list[str] | None = None) -> int:
    """Parse the command line, then show or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="resnet20,resnet56", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "training_free_cifar10.json")
    parser.add_argument("--show", type=Path, help="print the table of a file and end")
    given = parser.parse_args(words)
    if given.show is not None:
        print(markdown(read_rows(given.show)))
        return 0
    names: dict[str, tuple[list[str], dict[str, Any]]] = {
        "--tasks": (given.tasks.split(","), TASKS),
        "--methods": (given.methods.split(","), METHODS),
    }
    for option, (asked, known) in names.items():
        if unknown := [name for name in asked if name not in known]:
            parser.error(f"{option}: unknown {unknown[0]!r}; give some of {', '.join(known)}.")
    measure(given.tasks.split(","), given.methods.split(","), [int(s) for s in given.seeds.split(",")], given.output)
    print(markdown(read_rows(given.output)))
    return 0


def measure(tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int], output: Path) -> None:
    """Make the rows that `output` lacks."""
    torch.set_num_threads(1)
    for task in tasks:
        spec, weights = TASKS[task]
        backbone = build_backbone(spec, weights=weights)
        network = backbone.network.eval()
        data = CIFAR10DataModule(normalization=backbone.normalization, augment="none")
        data.prepare_data()
        data.setup()
        reference: float | None = None
        for seed in seeds:
            for method in methods:
                rows = read_rows(output)
                if any((r["task"], r["method"], r["seed"]) == (f"cifar10_{task}", method, seed) for r in rows):
                    continue
                reference = accuracy(network, data) if reference is None else reference
                row = {"task": f"cifar10_{task}", "method": method, "seed": seed, "epochs": 0}
                row |= {"accuracy_reference": reference, **_run(network, data, method, seed)}
                write_rows(output, [*rows, row])
                print(json.dumps(row), flush=True)


def _run(network: nn.Module, data: CIFAR10DataModule, method: str, seed: int) -> dict[str, Any]:
    dataset = data.plain_train_dataloader().dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    images, labels = dataset.__getitems__(order[: IMAGES + HELD_OUT].tolist())  # type: ignore[attr-defined]
    convolutions = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d))
    target = 0.5 * convolutions / sum(p.numel() for p in network.parameters())
    start = time.process_time()
    try:
        small = METHODS[method](Case(copy.deepcopy(network), images, labels, target))
    except (ValueError, bsdp.UntraceableError) as error:
        reason = " ".join(str(error).split())[:200]
        return {"accuracy": None, "params_ratio": None, "macs_ratio": None, "minutes": None, "failed": reason}
    minutes = (time.process_time() - start) / 60
    ratios = {"params_ratio": small.params_ratio, "macs_ratio": small.macs_ratio, "latency_ratio": None}
    return {"accuracy": accuracy(small.network, data), **ratios, "minutes": minutes}


def accuracy(network: nn.Module, data: CIFAR10DataModule) -> float:
    """Share of the test images that are classified rightly."""
    right = total = 0
    with evaluating(network):
        for images, labels in data.test_dataloader():
            right += int((network(images).argmax(1) == labels).sum())
            total += len(labels)
    return right / total


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Mean over the seeds, and the range."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"]), []).append(row)
    lines = [f"| {' | '.join(TITLES)} |", f"{'| --- ' * len(TITLES)}|"]
    for (task, method), runs in groups.items():
        done = [run for run in runs if run["accuracy"] is not None]
        cells = [task, method, ", ".join(str(run["seed"]) for run in runs)]
        cells += [spread([run["accuracy_reference"] for run in runs], "{:.2%}")]
        cells += [spread([run["accuracy"] for run in done], "{:.2%}") if done else f"failed: {runs[0]['failed']}"]
        cells += [spread([run[key] for run in done], "{:.1%}") for key in ("params_ratio", "macs_ratio")]
        cells += [f"{60 * statistics.mean(run['minutes'] for run in done):.1f}" if done else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
