"""What the word ``compress`` of the command line does; it may know the data modules, unlike `bsdp.commands`."""

from __future__ import annotations

import importlib
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from bsdp._checks import check_at_least
from bsdp.artifacts import PRUNED_CHECKPOINT, load_artifact
from bsdp.backbones import build_backbone
from bsdp.cli import CONFIGS, resolve_config
from bsdp.compress import CompressionResult
from bsdp.compress import compress as _compress
from bsdp.datamodules import ImageDataModule, ImageFolderDataModule
from bsdp.export import refuse_existing
from bsdp.files import save
from bsdp.latency import LatencyTable
from bsdp.probing import evaluating
from bsdp.record import PruningRecord, RoundRecord
from bsdp.report import Measurements, summarize, write_summary
from bsdp.report_table import format_summary
from bsdp.stats import describe, described_layers, layer_rows, measure_positions, original_cost
from bsdp.stored_times import TABLE_FILE
from bsdp.widths import widths_of

_BATCH = 64
_WHEN: dict[str, bool | str] = {"auto": "auto", "always": True, "never": False}


def compress(
    data: str,
    output: str,
    target: float | None = None,
    backbone: str | None = None,
    weights: str = "default",
    ckpt: str | None = None,
    target_kind: Literal["params", "macs", "latency"] = "params",
    tolerance: float | None = None,
    allocation: Literal["kl", "taylor", "energy"] = "kl",
    metric: Literal["euclidean", "activation"] = "activation",
    compensate: Literal["auto", "always", "never"] = "auto",
    recalibrate: Literal["auto", "always", "never"] = "auto",
    images: int = 256,
    passes: int = 6,
    latency_table: str | None = None,
    latency_batch_size: int = 1,
    image_size: int | None = None,
    data_dir: str | None = None,
    val_images: int = 1000,
    test: bool = False,
    seed: int = 0,
    force: bool = False,
) -> str:
    """Compress a trained network without training: some hundred images, no labels, seconds to a minute.

    Writes ``pruned.safetensors`` (for `bsdp.load` and ``bsdp export --ckpt``) and ``summary.json``. The network comes
    from `backbone` with its own head, or from `ckpt`. Labels of the data serve for
    measuring, for ``taylor`` and for a tolerance.

    Args:
        data: Where training images come from: the name of a packaged configuration of data (``cifar10``), a YAML file
            like it, or a folder with ``train/<class>`` and ``test/<class>``.
        output: Folder to write to.
        target: Share to remove, in (0, 1). Beside a tolerance: the share that is enough.
        backbone: ``bsdp:NAME``, ``torchvision:NAME`` or ``timm:NAME``.
        weights: Of the backbone: ``default``, the name of published ones, or a file.
        ckpt: Run folder, or checkpoint of a TransferTask, pruned or not, in place of a backbone.
        target_kind: What shares are of, those to remove and those that are tried; ``latency``: the time of a pass on
            this machine.
        tolerance: Largest allowed fall of the accuracy on validation images, as a fraction (0.01 = 1 point): the
            smallest network within it is searched for, which takes some six times as long.
        allocation: What decides how much each layer loses: the change of the network's predictions (``kl``), of the
            loss (``taylor``, by labels), or of each layer's own outputs (``energy``).
        metric: How bases are chosen.
        compensate: Whether to fit shortened layers to the outputs of the original network; ``auto``: if outputs on
            held-out images then are closer to the original's.
        recalibrate: Whether to recompute the statistics of batch norms; ``auto``: likewise.
        images: Training images to decide by.
        passes: Passes over the images in which layers are shortened.
        latency_table: File of ``bsdp latency``. Default: with ``target_kind=latency`` layers are timed first, and the
            table is written beside the network. With another kind, layers that are no faster as a pair are left whole.
        latency_batch_size: Images in a pass when layers are timed: that of later use.
        image_size: Height and width of the images. Default: those of the run, or of the data's configuration.
        data_dir: Folder that holds the data sets. Default: BSDP_DATA.
        val_images: Validation images to measure the accuracy on, before and after; 0 for none.
        test: Measure on all test images, too.
        seed: Which training images are taken, and of random signs.
        force: Replace existing files.
    """
    folder = Path(output).expanduser()
    paths = [folder / Path(PRUNED_CHECKPOINT).with_suffix(".safetensors"), folder / "summary.json"]
    measures = target_kind == "latency" and latency_table is None
    if measures:
        paths.append(folder / TABLE_FILE)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output`: {output!r} is a file, and a folder is to be made there: choose another name.")
    for path in paths:
        refuse_existing(path, force=force)
    check_at_least("val_images", val_images, 0)
    if target is None and tolerance is None:
        raise ValueError("give `--target`, the share to remove, `--tolerance`, the accuracy that may be lost, or both.")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"`tolerance` is a fraction, 0.01 for one point of accuracy, and below 1; got {tolerance}.")
    if tolerance is not None and not val_images:
        raise ValueError("`tolerance` is a fall of the accuracy on validation images: give some (`--val-images`).")
    if latency_table is not None:
        LatencyTable.load(latency_table).check_batch_size(latency_batch_size)  # before data and weights are prepared
    source = _source(backbone, weights, ckpt)
    module = _data_module(data, source, image_size=image_size, data_dir=data_dir)
    module.prepare_data()
    module.setup("fit")
    other = _other_classes(source.metadata, module.class_names)
    known = not other
    if allocation == "taylor" and not known:
        raise ValueError(
            f"`allocation=taylor` needs labels of the network's own classes, but {other}: choose `kl`, which does "
            "without labels."
        )
    if tolerance is not None and not known:
        raise ValueError(f"`tolerance` needs labels of the network's own classes, but {other}: give a `target` alone.")
    validation = _sample(module.val_dataloader(), val_images, seed=0) if val_images and known else None
    result = _compress(
        source.network,
        _sample(module.plain_train_dataloader(), images + images // 2, seed=seed),
        target=target,
        target_kind=target_kind,
        tolerance=tolerance,
        evaluate=None if tolerance is None or validation is None else lambda network: _accuracy(network, validation),
        allocation=allocation,
        metric=metric,
        compensate=_WHEN[compensate],
        recalibrate=_WHEN[recalibrate],
        images=images,
        passes=passes,
        latency_table=latency_table,
        latency_batch_size=latency_batch_size,
        seed=seed,
        progress=lambda line: print(f"bsdp compress: {line}", file=sys.stderr, flush=True),
    )
    measured = _measure(source.network, result, module, validation, test=test and known)
    facts = {"class_names": module.class_names, "image_size": module.image_size, **(module.normalization or {})}
    save(result.model, paths[0], metadata={**source.metadata, **(facts if known else {})})
    asked = {"target": target, "target_kind": target_kind, "tolerance": tolerance}
    checked = 0 if validation is None else len(validation.dataset)  # type: ignore[arg-type]
    summary = _summary(result, module, source.network, measured, asked, images=checked, seed=seed)
    write_summary(summary, paths[1])
    if measures and result.latency_table is not None:
        result.latency_table.save(paths[2], force=True)
    lines = [format_summary(summary).rstrip(), *str(result).splitlines()[-2:]]
    lines += [f"no accuracy: {other}"] if other else []
    names = [path.name for path in paths]
    return "\n".join([*lines, f"wrote {', '.join(names[:-1])} and {names[-1]} to {folder}"])


@dataclass(frozen=True)
class _Source:
    """A network, and what `bsdp.save` keeps of it."""

    network: nn.Module
    metadata: dict[str, Any]
    normalization: dict[str, Any]
    image_size: int | None


def _source(backbone: str | None, weights: str, ckpt: str | None) -> _Source:
    if (backbone is None) == (ckpt is None):
        raise ValueError("give either `--backbone` (with `--weights`) or `--ckpt`.")
    if ckpt is not None:
        artifact = load_artifact(ckpt)
        if artifact.is_pruned and Path(artifact.source).suffix == ".safetensors":
            raise ValueError(f"`ckpt`: {ckpt!r} holds folded layers only: give the run folder or its pruned.ckpt.")
        facts = artifact.metadata
        normalization = {key: facts[key] for key in ("mean", "std") if facts.get(key)}
        size = facts["image_size"] if isinstance(facts.get("image_size"), int) else None
        return _Source(artifact.decomposed.eval(), dict(facts), normalization, size)
    assert backbone is not None
    if weights.lower() == "none":
        raise ValueError("`weights`: there is nothing to keep of random weights; give those of a trained network.")
    built = build_backbone(backbone, weights=weights)
    metadata: dict[str, Any] = {"backbone": backbone, "head": "original", "num_classes": built.num_classes}
    metadata |= {"pretrained": True, "image_size": built.image_size, **built.normalization}
    if built.class_names is not None:
        metadata["class_names"] = list(built.class_names)
    return _Source(built.network.eval(), metadata, built.normalization, None)


def _data_module(data: str, source: _Source, *, image_size: int | None, data_dir: str | None) -> ImageDataModule:
    given: dict[str, Any] = {"image_size": image_size or source.image_size, "data_dir": data_dir}
    given = {key: value for key, value in given.items() if value is not None}
    path = Path(data).expanduser()
    if (path / "train").is_dir():
        module: Any = ImageFolderDataModule(folder=str(path.absolute()), **{"image_size": 224, **given})
    elif path.is_dir():
        raise ValueError(
            f"`data`: the folder {data!r} has no folder `train` with one folder of images for each class: "
            "sort the images that way."
        )
    else:
        file = _data_file(data)
        try:
            settings = yaml.safe_load(file.read_text(encoding="utf-8"))["data"]
            package, _, name = settings["class_path"].rpartition(".")
            kind = getattr(importlib.import_module(package), name)
        except (KeyError, TypeError, ValueError, ImportError, AttributeError) as error:
            raise ValueError(f"`data`: {file} does not name a data module under `data: class_path:`.") from error
        module = kind(**{**settings.get("init_args", {}), **given})
    if not isinstance(module, ImageDataModule):
        raise ValueError(f"`data`: {type(module).__name__} is not a data module of labelled images of this package.")
    if module.normalization is None:
        module.normalization = source.normalization or None
    return module


def _data_file(data: str) -> Path:
    """Find the configuration that `data` names."""
    try:
        return Path(resolve_config(data if data.endswith(".yaml") else f"data/{data.removeprefix('data/')}"))
    except FileNotFoundError as error:
        names = ", ".join(sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml")))
        raise FileNotFoundError(
            f"`data`: there is no folder or YAML file {data!r}, nor a packaged configuration of that name; there are "
            f"{names}."
        ) from error


def _other_classes(metadata: dict[str, Any], names: list[str]) -> str:
    """Why labels of the data are not those of the network; "" if they are, as far as the network names its classes."""
    own = metadata.get("class_names")
    if metadata["num_classes"] != len(names):
        return f"the network has {metadata['num_classes']} classes, the data have {len(names)}"
    if not isinstance(own, list) or own == names:
        return ""
    odd = next((pair for pair in zip(own, names, strict=False) if pair[0] != pair[1]), (own, names))
    return f"the network's classes are not those of the data (for example {odd[0]!r} and {odd[1]!r})"


def _sample(loader: DataLoader[Any], count: int, *, seed: int) -> DataLoader[Any]:
    """Some of the images of a loader, drawn at random."""
    total = len(loader.dataset)  # type: ignore[arg-type]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    return DataLoader(Subset(loader.dataset, order.tolist()), batch_size=_BATCH, collate_fn=loader.collate_fn)


def _measure(
    original: nn.Module,
    result: CompressionResult,
    module: ImageDataModule,
    validation: DataLoader[Any] | None,
    *,
    test: bool,
) -> dict[str, tuple[float, float]]:
    """Accuracies before and after, by split."""
    measured = {}
    if result.reference is not None and result.value is not None:  # the search has measured
        measured["val"] = (result.reference, result.value)
    elif validation is not None:
        measured["val"] = (_accuracy(original, validation), _accuracy(result.model, validation))
    if test:
        module.setup("test")
        measured["test"] = (
            _accuracy(original, module.test_dataloader()),
            _accuracy(result.model, module.test_dataloader()),
        )
    return measured


def _accuracy(network: nn.Module, loader: DataLoader[Any]) -> float:
    right = torch.zeros((), dtype=torch.long)
    total = 0
    with evaluating(network):
        for images, labels in loader:
            outputs: Tensor = network(images)
            right += (outputs.argmax(1) == labels).sum()
            total += len(labels)
    return int(right) / max(total, 1)


def _summary(
    result: CompressionResult,
    module: ImageDataModule,
    given: nn.Module,
    measured: dict[str, tuple[float, float]],
    asked: dict[str, Any],
    *,
    images: int,
    seed: int,
) -> dict[str, Any]:
    """The summary of a run with one round, so that all that reads runs reads it."""
    ranks, stats, example = result.ranks, result.stats, torch.zeros(1, *module.image_shape)
    cost = original_cost(result.model, example, cost=result.cost).with_times_of(result.cost)
    full = {name: layer.full_rank for name, layer in cost.layers.items()}
    notes, known = _of_the_original(given, measured)
    before, after = known.get("val", (None, None))
    if 0 < (asked["tolerance"] or 0) * images < 1:
        notes.append(
            f"one of the {images} validation images is {100 / images:.2g} points of accuracy, more than the tolerance: "
            "give more (`--val-images`)."
        )
    record = PruningRecord(**{**asked, "target": asked["target"] or 0.0}, cost=cost, reference=before, chosen=1)
    record.input_shapes = [[1, *module.image_shape]]
    rounds = ((full, stats.params_original, stats.macs_original, before), (ranks, stats.params, stats.macs, after))
    record.rounds = [
        RoundRecord(i, 0, r, sum(cost.layers[n].groups * k for n, k in r.items()), params, macs, accuracy_best=accuracy)
        for i, (r, params, macs, accuracy) in enumerate(rounds)
    ]
    if cost.knows("latency"):
        record.rounds = [replace(entry, latency=cost.deployed(entry.ranks, "latency")) for entry in record.rounds]
    if widths_of(result.model):  # channels are gone, so that the cost of the original does not tell
        layers = described_layers(result.model)
        rows = layer_rows(result.model, measure_positions(result.model, layers, example))
        record.rounds[1] = replace(record.rounds[1], layers=rows)
    tested = known.get("test", (None, None))
    facts = Measurements(
        test_metric="test_accuracy" if "test" in known else None,
        accuracy_reference=tested[0],
        accuracy_pruned=tested[1],
        seed=seed,
        notes=tuple(notes),
    )
    own = ["output_change", "agreement", "compensated", "recalibrated", "examples", "held_out", "seconds"]
    own += ["reference", "value"]
    compression = {key: getattr(result, key) for key in own} | {"trials": [asdict(trial) for trial in result.trials]}
    summary = {**summarize(record, facts), "compression": compression}
    if asked["target"] is None:
        summary |= {"target": None, "reached_target": None}
    if asked["tolerance"] is not None:
        summary["met_tolerance"] = True  # or there is no result
    return summary


def _of_the_original(
    given: nn.Module, measured: dict[str, tuple[float, float]]
) -> tuple[list[str], dict[str, tuple[float | None, float]]]:
    """What was measured, without the accuracy of a network that was pruned before; that goes into a note."""
    stats = describe(given)
    notes = []
    if "val" in measured and "test" not in measured:
        notes.append(
            "val accuracy is on images cut from the training split of the data, which the network may know; "
            "`--test` measures on test images."
        )
    if stats.params == stats.params_original:
        return notes, dict(measured)
    accuracies = "".join(f", {split} accuracy {before:.2%}" for split, (before, _) in measured.items())
    notes.append(f"the network was pruned before: as it was given, it has {stats.params:,} parameters{accuracies}.")
    return notes, {split: (None, after) for split, (_, after) in measured.items()}
