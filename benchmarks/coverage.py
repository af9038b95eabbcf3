"""Which architectures can be decomposed, pruned, folded, saved and loaded: all of torchvision, one of each timm family.

    python benchmarks/coverage.py [--family torchvision|timm] [--model NAME ...] [--skip-done]
    python benchmarks/coverage.py --table

Every model is built with random weights and goes through these steps; a row says "pass", or the step and the reason.

    decompose   same outputs (relative error at most 1e-4 in float32; when in doubt 1e-10 in float64)
    score       one batch, forward and backward
    prune       half of all bases removed
    train       forward and backward of a batch in training mode, finite gradients
    fold        the outputs before it, and plain layers only
    load        saved to a file, loaded into a fresh model: the same outputs
    smaller     fewer parameters and multiply-adds than the original

Parameters and MACs kept are those of the folded model against the original one, heads included; MACs are half of what
torch's `FlopCounterMode` counts. Rows are kept in ``benchmarks/results/coverage_{torchvision,timm}.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import FlopCounterMode

# As a script: modules are looked up from the root, and this file must not hide the package named `coverage`.
ROOT = Path(__file__).resolve().parent.parent
sys.path = [str(ROOT), *(folder for folder in sys.path if Path(folder).resolve() != ROOT / "benchmarks")]

import bsdp  # noqa: E402
from benchmarks.coverage_models import Case, timm_case, timm_cases, torchvision_cases  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}
FAMILIES = {"torchvision": torchvision_cases, "timm": timm_cases}


@dataclass
class Row:
    """One model's line in the table."""

    family: str
    model: str
    result: str = "pass"
    dtype: str = "float32"
    decomposed: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    params_kept: float | None = None
    macs_kept: float | None = None
    seconds: float = 0.0


class StepFailed(Exception):
    """A step did not give what it must."""


def check(case: Case) -> Row:
    """Send one model through all steps."""
    start = time.monotonic()
    row = Row(case.family, case.name)
    try:
        try:
            _check(case, row, torch.float32)
        except _TooFar:  # rounding, or a real difference: float64 tells
            _check(case, row, torch.float64)
        row.result = "pass"
    except StepFailed as error:
        row.result = str(error)
    row.seconds = round(time.monotonic() - start, 1)
    return row


class _TooFar(StepFailed):
    """Outputs differ more than the tolerance."""


@contextmanager
def _step(name: str) -> Iterator[None]:
    try:
        yield
    except StepFailed as error:
        raise type(error)(f"{name}: {error}") from error
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        raise StepFailed(
            f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        ) from error


def _check(case: Case, row: Row, dtype: torch.dtype) -> None:
    row.dtype = str(dtype).removeprefix("torch.")
    tolerance = TOLERANCES[dtype]
    inputs = _cast(case.inputs(1), dtype)
    with _step("build"):
        model = _build(case, dtype)
        expected = _outputs(model, inputs)
        params, macs = _params(model), _macs(model, inputs)
        del model
        model = _build(case, dtype)  # anew: some models read their weights in the very first pass only
    with _step("decompose"):
        done = bsdp.decompose(model, example_input=inputs)
        row.decomposed = len(bsdp.named_pairs(model))
        row.skipped = dict(Counter(done.skipped.values()))
        _compare(_outputs(model, inputs), expected, tolerance)
    with _step("score"):
        bsdp.freeze(model)
        scores = bsdp.ScoreAccumulator(bsdp.named_pairs(model))
        _loss(model(*inputs)).backward()
        scores.update()
    with _step("prune"):
        cost = bsdp.measure_cost(model, inputs, new_bias=False)
        plan = bsdp.select(scores.compute(), cost, ratio=0.5)
        bsdp.prune(model, plan)
    with _step("train"):
        _train(model, _cast((case.training or case.inputs)(2), dtype))
    with _step("fold"):
        expected = _outputs(model, inputs)
        folded = bsdp.fold(model)
        odd = [type(m).__name__ for m in folded.modules() if type(m).__module__.startswith("bsdp")]
        if odd:
            raise StepFailed(f"{odd[0]} is left")
        _compare(_outputs(folded, inputs), expected, tolerance)
        if _params(folded) != cost.deployed(plan.ranks):
            raise StepFailed(f"{_params(folded)} parameters, but {cost.deployed(plan.ranks)} were planned")
    with _step("load"), tempfile.TemporaryDirectory() as folder:
        expected = _outputs(folded, inputs)
        path = bsdp.save(model, Path(folder) / "model.safetensors")
        del model
        loaded = bsdp.load(_build(case, dtype, seed=1), path)
        _compare(_outputs(loaded, inputs), expected, tolerance)
    with _step("smaller"):
        row.params_kept = round(_params(folded) / params, 4)
        row.macs_kept = round(_macs(folded, inputs) / macs, 4)
        if row.decomposed and not (row.params_kept < 1.0 and row.macs_kept < 1.0):
            raise StepFailed(f"{row.params_kept:.1%} of the parameters and {row.macs_kept:.1%} of the MACs are kept")


def _build(case: Case, dtype: torch.dtype, *, seed: int = 0) -> nn.Module:
    """The model in eval mode, with norms, biases and layer scales that do something."""
    torch.manual_seed(seed)
    model = case.build().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.is_floating_point() and (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(module.running_var, Tensor):
                module.running_var.uniform_(0.7, 1.4)
    return model


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    torch.manual_seed(0)  # what is drawn in a forward pass is drawn alike
    with torch.no_grad():
        outputs = _tensors(model.eval()(*inputs))
    if not outputs or not all(bool(t.isfinite().all()) for t in outputs):
        raise StepFailed("no finite outputs")
    return outputs


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _compare(outputs: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    if [t.shape for t in outputs] != [t.shape for t in expected]:
        raise _TooFar("the outputs have other shapes")
    for output, reference in zip(outputs, expected, strict=True):
        scale = max(float(reference.norm()), 1e-12)
        error = float((output - reference).norm()) / scale
        if not error <= tolerance:
            raise _TooFar(f"relative error {error:.1e}")


def _loss(outputs: Any) -> Tensor:
    # Random weights may give outputs of any size.
    terms = [
        (t / t.detach().abs().amax().clamp_min(1e-30)).square().mean() for t in _tensors(outputs) if t.requires_grad
    ]
    if not terms:
        raise StepFailed("no output depends on a trainable parameter")
    return torch.stack(terms).sum()


def _train(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    model.train().zero_grad()
    _loss(model(*inputs)).backward()
    gradients = [p.scaling.delta.grad for p in bsdp.named_pairs(model).values()]
    present = [g for g in gradients if g is not None]
    if gradients and (not present or not all(bool(g.isfinite().all()) for g in present)):
        raise StepFailed("no finite gradients")
    model.eval()


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _macs(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)  # without gradients the counter trips over views of parameters
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    return max(1, counter.get_total_flops() // 2)


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, help="only this library; default: both")
    parser.add_argument("--model", nargs="+", help="only these models, of any timm family; nothing is written")
    parser.add_argument("--skip-done", action="store_true", help="keep the rows that passed before")
    parser.add_argument("--table", action="store_true", help="print the rows that are there, run nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.model:
        rows = [_checked(case) for case in find_cases(options.model, options.family)]
        sys.exit(0 if all(row.result == "pass" for row in rows) else 1)
    for library in [options.family] if options.family else FAMILIES:
        if not options.table:
            run(library, skip_done=options.skip_done)
        print_table(library)


def find_cases(names: list[str], library: str | None = None) -> list[Case]:
    """The cases of the given names; of timm any model, not only the smallest of its family."""
    found: list[Case] = []
    known = {case.name: case for case in torchvision_cases()} if library != "timm" else {}
    for name in names:
        if name in known:
            found.append(known[name])
        else:
            import timm

            if library == "torchvision" or not timm.is_model(name):
                sys.exit(f"error: `--model`: neither torchvision nor timm has a model {name!r}.")
            found.append(timm_case(name))
    return found


def run(library: str, *, skip_done: bool) -> None:
    """Check every model of a library and keep the rows."""
    done = {row.model: row for row in read_rows(library) if row.result == "pass"} if skip_done else {}
    rows: list[Row] = []
    for case in FAMILIES[library]():
        rows.append(done.get(case.name) or _checked(case))
        write_rows(library, [*rows, *(row for name, row in done.items() if name not in {r.model for r in rows})])
    write_rows(library, rows)


def _checked(case: Case) -> Row:
    row = check(case)
    print(f"{row.family} {row.model}: {row.result} ({row.dtype}, {row.seconds:.0f} s)", flush=True)
    gc.collect()
    return row


def read_rows(library: str) -> list[Row]:
    """The rows kept of a library."""
    path = RESULTS / f"coverage_{library}.json"
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.is_file() else []


def write_rows(library: str, rows: list[Row]) -> None:
    """Keep rows, with the versions they were made with."""
    import timm
    import torchvision

    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
    versions = {name: version.partition("+")[0] for name, version in versions.items()}
    lines = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
    text = f'{{"versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n'
    (RESULTS / f"coverage_{library}.json").write_text(text)


def print_table(library: str) -> None:
    """Print the rows as Markdown."""
    rows = read_rows(library)
    passed = Counter(row.family.split()[0] if library == "timm" else row.family for row in rows if row.result == "pass")
    total = Counter(row.family.split()[0] if library == "timm" else row.family for row in rows)
    for family, count in total.items():
        print(f"{family}: {passed[family]} of {count} pass")
    print("\n| family | model | result | layers: pairs / left | params kept | MACs kept | compared in |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        kept = ["-" if v is None or math.isnan(v) else f"{v:.1%}" for v in (row.params_kept, row.macs_kept)]
        layers = f"{row.decomposed} / {sum(row.skipped.values())}"
        print(f"| {row.family} | {row.model} | {row.result} | {layers} | {kept[0]} | {kept[1]} | {row.dtype} |")


if __name__ == "__main__":
    main()
