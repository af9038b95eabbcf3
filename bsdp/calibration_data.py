"""Some hundred examples to look at a network with: taken from whatever data there are, checked, and split in two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

_EVERY = 3  # of so many examples one is held out


@dataclass(frozen=True)
class Examples:
    """Inputs of a network, and labels where they are known.

    Attributes:
        inputs: Arguments of the network, tensors with the examples along the first axis.
        labels: Class indices, ``[examples]``; None where there are none.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.inputs[0])

    def take(self, indices: Tensor) -> Examples:
        """Some of the examples."""
        labels = None if self.labels is None else self.labels[indices]
        return Examples(tuple(t[indices] for t in self.inputs), labels)

    def batches(self, size: int, device: torch.device | None = None) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
        """Inputs and labels, in batches as equal as they can be."""
        count = -(-len(self) // size)
        for indices in torch.arange(len(self)).tensor_split(count):
            part = self.take(indices)
            labels = None if part.labels is None else part.labels.to(device)
            yield tuple(t.to(device) for t in part.inputs), labels


@dataclass(frozen=True)
class CalibrationData:
    """The examples that decide, and others that tell how good the decisions were.

    Attributes:
        seen: Examples for all statistics.
        held_out: Every third example; the same as `seen` where there are fewer than six.
    """

    seen: Examples
    held_out: Examples


def collect_examples(data: Any, *, images: int) -> CalibrationData:
    """Take examples from the beginning of some data, which are looked through once.

    Args:
        data: A tensor of inputs, or an iterable of batches (a DataLoader, a list, a generator): tensors, pairs
            ``(inputs, labels)`` with one whole number per example, or tuples of arguments of the network. Shuffled, or
            the first images are of few classes.
        images: Examples to decide by; half as many more are held out.

    Raises:
        ValueError: If there are fewer than two examples, or they hold NaN or infinity.
        TypeError: If the data are of another form.
    """
    wanted = images + images // (_EVERY - 1)
    batches = [data] if isinstance(data, Tensor) else data
    if not isinstance(batches, Iterable) or isinstance(batches, (str, dict)):
        raise TypeError(f"`data` must be a tensor, or an iterable of batches such as a DataLoader, got {_kind(data)}.")
    parts: list[Examples] = []
    found = 0
    for batch in batches:
        part = _examples(batch)
        part = part.take(torch.arange(min(len(part), wanted - found)))
        parts.append(part)
        found += len(part)
        if found >= wanted:
            break
    if found < 2:
        raise ValueError(f"`data` has {found} examples: give some hundred images (at least 2; no labels are needed).")
    whole = _joined(parts)
    if not all(t.isfinite().all() for t in whole.inputs if t.is_floating_point()):
        raise ValueError("`data` holds NaN or infinity: check how the images are read and normalised.")
    if found < 2 * _EVERY:
        return CalibrationData(whole, whole)
    held = torch.arange(found) % _EVERY == _EVERY - 1
    return CalibrationData(whole.take((~held).nonzero()[:, 0]), whole.take(held.nonzero()[:, 0]))


def _examples(batch: Any) -> Examples:
    if isinstance(batch, Tensor):
        return Examples((batch.detach().cpu(),), None)
    if not isinstance(batch, (tuple, list)) or not batch or not all(isinstance(t, Tensor) for t in batch):
        raise TypeError(
            f"`data` has a batch of type {_kind(batch)}: it must be a tensor of inputs, a pair (inputs, labels) of "
            "tensors, or a tuple of tensors that the network takes."
        )
    tensors = [t.detach().cpu() for t in batch]
    if any(t.dim() == 0 or len(t) != len(tensors[0]) for t in tensors):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"`data` has a batch whose tensors do not have equally many examples: {shapes}.")
    last = tensors[-1]
    labelled = len(tensors) == 2 and last.dim() == 1 and not last.is_floating_point()
    return Examples(tuple(tensors[:-1] if labelled else tensors), last.long() if labelled else None)


def _joined(parts: list[Examples]) -> Examples:
    labels = [part.labels for part in parts if part.labels is not None]
    try:
        inputs = tuple(torch.cat(tensors) for tensors in zip(*(part.inputs for part in parts), strict=True))
        return Examples(inputs, torch.cat(labels) if len(labels) == len(parts) else None)
    except (RuntimeError, ValueError) as error:
        shapes = sorted({str([tuple(t.shape[1:]) for t in part.inputs]) for part in parts})
        raise ValueError(f"`data` has examples of different shapes: {', '.join(islice(shapes, 3))}.") from error


def _kind(value: object) -> str:
    return type(value).__name__
