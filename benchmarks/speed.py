"""How fast the project is: training, decomposing, and the folded networks. Ratios are of things timed in turn.

    python benchmarks/speed.py callbacks              an epoch with the callbacks against one without them
    python benchmarks/speed.py callbacks --method taylor_2019 --networks bsdp:resnet20,32,16 --batches 64
    python benchmarks/speed.py scales                 training scales against all weights: time and peak memory, by rank
    python benchmarks/speed.py decompose              seconds and peak memory of `bsdp.decompose` for large networks
    python benchmarks/speed.py growth                 how that grows with the width of a layer and the number of images
    python benchmarks/speed.py parallel               whether layers side by side are decomposed faster
    python benchmarks/speed.py folded                 speed-up over MAC reduction, by selection, in eager mode
    python benchmarks/speed.py folded --engines compile,onnxruntime --selections macs,channels
    python benchmarks/speed.py profile                where the time of the original and the pruned network goes

Every part prints a Markdown table and writes its rows, as they come, to benchmarks/results/speed_PART.json (`--output`
for another file), where rows of other networks, batch sizes, engines, selections or methods stay. Times are processor
times of one thread (`--threads`), which other load on the machine disturbs less than times on the wall; medians of
calls in turn. Data and weights are random. On two idle cores a part takes one to three minutes (compiling: longer).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# As a script: modules are looked up from the root, and benchmarks/coverage.py must not hide the package `coverage`.
ROOT = Path(__file__).resolve().parent.parent
sys.path = [str(ROOT), *(folder for folder in sys.path if Path(folder).resolve() != ROOT / "benchmarks")]

import torch  # noqa: E402

from benchmarks import _speed_decompose, _speed_folded, _speed_training  # noqa: E402
from benchmarks._runs import commit  # noqa: E402
from benchmarks._speed_common import Row, facts, markdown  # noqa: E402
from benchmarks._tables import write_text  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "callbacks": _speed_training.callbacks,
    "scales": _speed_training.scales,
    "decompose": _speed_decompose.decompose,
    "growth": _speed_decompose.growth,
    "parallel": _speed_decompose.parallel,
    "folded": _speed_folded.folded,
    "profile": _speed_folded.profile,
}
_WHERE = ("network", "image_size", "batch_size", "engine", "threads")
_IDENTITY = (*_WHERE, "batches", "selection", "method", "metric", "what", "size")
_REPEATS = {"callbacks": 3, "scales": 7, "folded": 20, "parallel": 3}


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    options = parser().parse_args(words)
    torch.set_num_threads(options.threads)
    if options.repeats is None:
        options.repeats = _REPEATS.get(options.part, 1)
    path = Path(options.output or RESULTS / f"speed_{options.part}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    before: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows: list[Row] = []
    words = sys.argv[1:] if words is None else words
    command = {"command": shlex.join(["python", "benchmarks/speed.py", *words]), "commit": commit()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in PARTS[options.part](options):
            rows.append(row | {key: value for key, value in (facts() | command).items() if key not in row})
            lines = ",\n".join("  " + json.dumps(kept) for kept in merged(before, rows))
            write_text(path, f"[\n{lines}\n]\n")  # after every row: a long part may be stopped
    hidden = {"part", *facts(), *command}
    print(markdown([{key: value for key, value in row.items() if key not in hidden} for row in rows]))
    print(f"{path}: {len(merged(before, rows))} rows")


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("part", choices=list(PARTS))
    methods = [*_speed_training.FRAME, *_speed_training.CRITERIA]
    result.add_argument("--method", choices=methods, default="basis", help="callbacks: the pruning callback")
    result.add_argument(
        "--networks",
        nargs="+",
        type=network,
        default=[],
        metavar="NAME[,SIZE[,BATCH]]",
        help="backbones instead of the usual ones, with the size of the images and, for training, of the batch",
    )
    result.add_argument("--batches", type=int, default=16, help="callbacks: batches in an epoch")
    result.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32], help="folded, profile: images in a pass")
    result.add_argument("--engines", type=_words(_speed_folded.ENGINES), default=["eager", "channels_last"])
    selections = _speed_folded.SELECTIONS
    result.add_argument("--selections", type=_words(selections), default=list(selections), help="folded: what is cut")
    result.add_argument("--images", type=int, default=4, help="decompose: images for the statistics")
    result.add_argument("--repeats", type=int, help="timed rounds")
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--output", help="file of the rows")
    return result


def network(text: str) -> tuple[str, int, int]:
    """``bsdp:resnet20,32,64`` as name, image size and batch size; 64 and 32 where they are left out."""
    name, *sizes = text.split(",")
    size, batch = [*map(int, sizes), *(64, 32)[len(sizes) :]]
    return name, size, batch


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The old rows but those that were measured again, and the new ones."""
    again = {_identity(row) for row in new}
    return [row for row in old if _identity(row) not in again] + list(new)


def _identity(row: Row) -> tuple[object, ...]:
    return tuple(row.get(key) for key in _IDENTITY)


def _words(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def words(text: str) -> list[str]:
        chosen = text.split(",")
        odd = [word for word in chosen if word not in allowed]
        if odd:
            raise argparse.ArgumentTypeError(f"{odd[0]!r} is none of {', '.join(allowed)}")
        return chosen

    return words


if __name__ == "__main__":
    main()
