"""What the words ``export``, ``describe``, ``benchmark`` and ``latency`` of the command line do, as functions."""

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bsdp import export as _export
from bsdp._checks import check_at_least, check_choice
from bsdp._compare import largest_difference, tolerance_for
from bsdp.artifacts import Artifact, UnknownNetworkError, load_artifact
from bsdp.channel_latency import ChannelLatencyTable
from bsdp.channel_latency_measuring import measure_channel_latency_table
from bsdp.decompose import decompose
from bsdp.export import refuse_existing, written_beside
from bsdp.files import load, save
from bsdp.latency import LatencyTable
from bsdp.latency_measuring import measure_latency_table
from bsdp.probing import evaluating
from bsdp.reading import reason_of
from bsdp.speed import compare_speed
from bsdp.stats import ModelStats
from bsdp.stats import describe as _describe
from bsdp.stored_layers import stored_layers_table


def export(
    ckpt: str,
    format: Literal["onnx", "pt2", "safetensors"],
    output: str | None = None,
    image_size: int | None = None,
    dynamic_batch: bool = False,
    channels_last: bool = False,
    check: bool = True,
    force: bool = False,
) -> None:
    """Write the folded network of a run, of plain layers only, as one file that runs elsewhere.

    Batch norms are folded into the layers before them where that is exact (not in safetensors files, which
    `bsdp.load` reads into the original architecture).

    Args:
        ckpt: Run folder (its pruned.ckpt is taken), checkpoint of a TransferTask, or pruned.safetensors.
        format: ``onnx`` (needs ``pip install 'bsdp[export]'``), ``pt2`` (a program for `torch.export.load`) or
            ``safetensors`` (for `bsdp.load`).
        output: File to write. Default: ``model.onnx`` (``.pt2``, ``.safetensors``) beside the checkpoint.
        image_size: Height and width of the images. Default: those of the run.
        dynamic_batch: Let the batch be of any size; else it is one image (onnx and pt2; safetensors has no batch).
        channels_last: Store the weights of a pt2 program with channels last.
        check: Run the written file on random images and compare it with PyTorch (onnx: with onnxruntime). A file whose
            outputs differ by more than rounding is not kept. ``--check false`` leaves it out.
        force: Replace an existing file.
    """
    if channels_last and format != "pt2":
        raise ValueError(
            f"`channels_last` is a memory layout of torch, which {format} files do not have: leave it out."
        )
    if dynamic_batch and format == "safetensors":
        raise ValueError("`dynamic_batch`: a safetensors file holds weights, which go with any batch: leave it out.")
    other = Path(output or "").suffix.removeprefix(".")
    if other != format and other in ("onnx", "pt2", "safetensors"):
        raise ValueError(f"`output`: {output!r} would be a {format} file by the name of another: end it in .{format}.")
    artifact = load_artifact(ckpt)
    assert isinstance(artifact.source, Path)
    path = artifact.source.with_name(f"model.{format}") if output is None else Path(output).expanduser()
    refuse_existing(path, force=force)
    if path.exists() and path.samefile(artifact.source):
        raise ValueError(f"`output`: {str(path)!r} is the file that is exported; choose another name.")
    example = _example(artifact, image_size)
    print(_title(artifact, example))
    if format == "safetensors":
        print("batch norms stay, so that the file loads into the original architecture")
        _write_safetensors(artifact, path, example, check=check)
        print(f"{path}: {path.stat().st_size:,} bytes")
    else:
        metadata = artifact.metadata | ({} if image_size is None else {"image_size": image_size})
        options = {"dynamic_batch": dynamic_batch, "channels_last": channels_last, "check": check, "force": force}
        print(_export(artifact.folded, path, example, format=format, metadata=metadata, **options))
    stats, _ = _stats(artifact, example)
    print(f"parameters: {stats.params:,} of {stats.params_original:,} ({stats.params_kept:.1%} kept)")
    if stats.macs is not None and stats.macs_kept is not None:
        print(f"MACs: {stats.macs:,} of {stats.macs_original:,} ({stats.macs_kept:.1%} kept)")


def describe(target: str, image_size: int | None = None) -> str:
    """Show the layers of a network: how each is deployed, at which rank, and what it costs.

    Args:
        target: Run folder (its pruned.ckpt is taken), checkpoint, pruned.safetensors, or the name of a backbone such as
            ``bsdp:resnet20``, ``torchvision:mobilenet_v2`` or ``timm:resnet18``. Of a file that does not say how to
            build its network, only the stored layers are shown.
        image_size: Height and width of the images for the MACs. Default: those of the run, or of the pretraining.
    """
    try:
        artifact = load_artifact(target, backbones=True)
    except UnknownNetworkError as error:
        return f"{stored_layers_table(error.path)}\n{error}"
    example = _example(artifact, image_size)
    stats, note = _stats(artifact, example)
    return "\n".join([_title(artifact, example), str(stats), *note])


def benchmark(
    ckpt: str,
    batch_size: list[int] = [1, 32],  # noqa: B006 (shown as the default in --help, never changed)
    threads: int | None = None,
    repeats: int = 30,
    seconds: float = 60.0,
    image_size: int | None = None,
    channels_last: Literal["try", "always", "never"] = "try",
    device: str = "cpu",
) -> str:
    """Time the original and the pruned network in turn, in one process.

    The original is the undecomposed architecture with the same head. Both have their batch norms.

    Args:
        ckpt: Run folder (its pruned.ckpt is taken), checkpoint of a TransferTask, or pruned.safetensors.
        batch_size: Images in a pass, one or more numbers.
        threads: Threads of torch. Default: what torch takes by itself.
        repeats: Timed passes of each network, after 5 passes that warm up.
        seconds: End the passes of one batch size after so many seconds, but not before the fifth.
        image_size: Height and width of the images. Default: those of the run.
        channels_last: ``try`` measures both memory layouts and compares the better ones, ``always`` and ``never``
            measure one.
        device: ``cpu`` or ``cuda``.
    """
    place = _device(device)
    check_at_least("batch_size", min(batch_size, default=0), 1)
    artifact = load_artifact(ckpt)
    example = _example(artifact, image_size)
    layouts = {"try": ("contiguous", "channels_last"), "always": ("channels_last",), "never": ("contiguous",)}
    networks = [network.to(place) for network in (artifact.original(), artifact.folded)]
    comparison = compare_speed(
        *(networks[0], networks[1], example.to(place)),
        batch_sizes=batch_size,
        layouts=layouts[channels_last],
        threads=threads,
        repeats=repeats,
        seconds=seconds,
    )
    return f"{_title(artifact, example)}\n{comparison}"


def latency(
    target: str,
    output: str,
    by: Literal["ranks", "widths"] = "ranks",
    batch_size: int = 1,
    multiple: int = 8,
    threads: int | None = None,
    repeats: int = 15,
    image_size: int | None = None,
    num_classes: int | None = None,
    channels_last: bool = False,
    device: str = "cpu",
    force: bool = False,
) -> str:
    """Time every layer by rank, for pruning bases, or by width, for pruning channels, and save the table.

    By ranks: every layer that can be decomposed, as one layer and as a pair. `IterativeBasisPruning` goes by it with
    ``latency_table: FILE``, ``bsdp compress`` with ``--latency-table FILE``: for budgets of latency, and to leave
    layers alone that are faster as one layer. By widths: every layer whose channels can go, with several numbers of
    inputs and outputs; for ``target_kind: latency`` of `ChannelPruning`.

    Args:
        target: Run folder (its pruned.ckpt is taken), checkpoint, pruned.safetensors, or the name of a backbone such as
            ``bsdp:resnet20``. By ranks, a network that is not decomposed yet is, with the default settings; by
            widths it is the original network that is timed.
        output: File to write, JSON.
        by: ``ranks`` or ``widths``.
        batch_size: Images in a pass: that of later use.
        multiple: Ranks or widths to time are multiples of it, as wide as the vectors of the hardware.
        threads: Threads of torch. Default: what torch takes by itself.
        repeats: Timed passes per rank or width, after 2 passes that warm up.
        image_size: Height and width of the images. Default: those of the run, or of the pretraining.
        num_classes: Outputs of the new head that a backbone given by its name will get. Times by width need it, for
            the head reads channels that can go. Default: those of the pretraining.
        channels_last: Time with channels last.
        device: ``cpu`` or ``cuda``.
        force: Replace an existing file.
    """
    check_choice("by", by, ("ranks", "widths"))
    place, path = _device(device), Path(output).expanduser()
    refuse_existing(path, force=force)
    artifact = load_artifact(target, backbones=True, num_classes=num_classes)
    example, network = _example(artifact, image_size), artifact.decomposed
    if by == "widths":
        network = artifact.original()
    elif not artifact.is_pruned:
        decompose(network, example_input=example)
    network.to(place)
    example = example.to(place)
    if channels_last:
        network.to(memory_format=torch.channels_last)
        example = example.contiguous(memory_format=torch.channels_last)
    options: dict[str, Any] = {"multiple": multiple, "threads": threads, "repeats": repeats}
    table: LatencyTable | ChannelLatencyTable
    if by == "widths":
        table = measure_channel_latency_table(network, example, batch_size=batch_size, **options)
        which = "layers whose channels can go, and what shrinks with their outputs"
    else:
        table = measure_latency_table(network, example, batch_size=batch_size, **options)
        pays = sum(layer.pair_limit > 0 for layer in table.layers.values())
        which = f"decomposed layers; {pays} of them can get faster"
    table.save(path, force=force)
    return (
        f"{_title(artifact, example)}\n{path}: {table.original_ns / 1e6:.3g} ms for {batch_size} image(s), "
        f"{100 * table.fixed_ns / table.original_ns:.0f} % of it outside of the {len(table.layers)} {which}"
    )


def _title(artifact: Artifact, example: Tensor) -> str:
    facts = artifact.metadata
    shape = "x".join(map(str, example.shape[1:]))
    return f"{artifact.source}: {facts['backbone']}, {facts['num_classes']} classes, images {shape}"


def _example(artifact: Artifact, image_size: int | None) -> Tensor:
    """One image, of a size that the network takes."""
    if image_size is not None:
        check_at_least("image_size", image_size, 1)
    example = artifact.example(image_size=image_size)
    try:
        with evaluating(artifact.folded):
            artifact.folded(example)
    except Exception as error:  # whatever the network's own code raises
        raise ValueError(
            f"`image_size`: {artifact.metadata['backbone']} does not take images of {tuple(example.shape[2:])} "
            f"({reason_of(error)}); give another size."
        ) from error
    return example


def _stats(artifact: Artifact, example: Tensor) -> tuple[ModelStats, list[str]]:
    """Statistics with MACs where the network can be traced for them, and a note where it cannot."""
    try:
        return _describe(artifact.decomposed, example), []
    except Exception as error:  # fvcore's tracer fails in many ways
        return _describe(artifact.decomposed), [f"MACs could not be counted: {reason_of(error)}"]


def _write_safetensors(artifact: Artifact, path: Path, example: Tensor, *, check: bool) -> None:
    with written_beside(path, suffix=".safetensors") as partial:
        if Path(artifact.source).suffix == ".safetensors":
            shutil.copyfile(artifact.source, partial)
        else:
            save(artifact.decomposed, partial, metadata=artifact.metadata)
        if not check:
            return
        read = load(artifact.original(), partial)
        with evaluating(read), evaluating(artifact.folded):
            difference = largest_difference(artifact.folded(example), read(example))
        if not difference.relative <= tolerance_for(read):
            raise ValueError(f"the written file is another network: the outputs differ by {difference}.")
        print(f"checked: largest difference of the outputs {difference}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` must be cpu or cuda, got {name!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be cpu or cuda, got {name!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` is cuda, but torch sees no GPU.")
    return device
