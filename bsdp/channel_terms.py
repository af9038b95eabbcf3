"""First-order terms of channels in one optimizer step, from the gradients of weights or from hooks.

Both ways are exact. The weights' gradients cost next to nothing; hooks at the readers' inputs serve groups where some
weight has no gradient (it is frozen, or the reader is a pair), and terms per example.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bsdp.channel_criteria import reader_terms, taylor_2016, taylor_2019
from bsdp.channel_watching import Readers, by_example, trains, widened
from bsdp.input_watching import watch_gradients
from bsdp.plain_layers import weight_of


class StepTerms:
    """Collects the terms of one optimizer step.

    Args:
        readers: Layers that read the groups.
        per_example: Whether to take absolute values per example, as in 2016, and not the square of a whole step.
    """

    def __init__(self, readers: Readers, *, per_example: bool) -> None:
        self.readers, self.per_example = readers, per_example
        self._forwards = 0
        self.clear()

    def clear(self) -> None:
        """Forget the present step."""
        self._watched: dict[int, dict[str, Tensor]] = {}  # by forward pass and reader
        self._settled: Tensor | None = None  # per unit
        self._seen: set[str] = set()

    def hooked(self) -> list[bool]:
        """Per group, whether its terms come from hooks."""
        if self.per_example:
            return [True] * len(self.readers.of_group)
        by_weight = {name for name, layer in self.readers.layers.items() if trains(layer)}
        return [not by_weight.issuperset(names) for names in self.readers.of_group]

    def attach(self, model: nn.Module, scale: float) -> list[Any]:
        """Add hooks for the groups that need them and return their handles.

        Args:
            model: The model whose forward is one pass.
            scale: What gradients are divided by.
        """
        chosen = _names(self.readers, self.hooked())
        handles: list[Any] = [
            watch_gradients(layer, self._sink(name, scale))
            for name, layer in self.readers.layers.items()
            if name in chosen
        ]
        return [*handles, model.register_forward_pre_hook(self._count_forward)] if handles else handles

    def _count_forward(self, *_: Any) -> None:
        self._forwards += self.per_example  # examples of two passes are not the same

    def _sink(self, name: str, scale: float) -> Callable[[], Callable[[Tensor, Tensor], None]]:
        layer = self.readers.layers[name]

        def start() -> Callable[[Tensor, Tensor], None]:
            watched, forward = self._watched, self._forwards  # a backward that comes too late writes to what is gone

            def add(inputs: Tensor, gradient: Tensor) -> None:
                terms = by_example(layer, widened(inputs) * widened(gradient), mean=self.per_example)
                value = (terms if self.per_example else terms.sum(0)) / scale
                values = watched.setdefault(forward, {})
                values[name] = values[name] + value if name in values else value

            return add

        return start

    def settle(self) -> None:
        """Sum what was seen per example over the examples; call it when a batch is over, to save memory."""
        if not self.per_example:
            return
        for values in self._watched.values():
            if not all(map(len, values.values())):
                continue  # an empty batch
            terms = taylor_2016(self.readers.units(self.readers.flat(_same_examples(values)), mean=True))
            self._settled = terms if self._settled is None else self._settled + terms
            self._seen.update(values)
        self._watched = {}

    def take(self, groups: Sequence[bool] | None = None) -> tuple[Tensor | None, list[bool]]:
        """Non-negative terms of the step per unit, and which groups have any; then forget them.

        Args:
            groups: Which groups to take, the others wait and have zeros; None for all.
        """
        if self.per_example:
            self.settle()
            terms, seen = self._settled, [not self._seen.isdisjoint(names) for names in self.readers.of_group]
        else:
            terms, seen = self._whole_step()
        if groups is None or all(groups):
            self.clear()
            return terms, seen
        seen = [found and wanted for found, wanted in zip(seen, groups, strict=True)]
        terms = None if terms is None else torch.where(self._units(groups, terms), terms, 0.0)
        self._forget(groups)
        return terms, seen

    def _units(self, groups: Sequence[bool], like: Tensor) -> Tensor:
        """Which units are of the groups that are marked."""
        return torch.tensor(groups).repeat_interleave(torch.tensor(self.readers.sizes)).to(like.device)

    def _forget(self, groups: Sequence[bool]) -> None:
        """Forget the step of the groups that are marked, in place: a backward for the others may be still to come."""
        kept = _names(self.readers, [not marked for marked in groups])
        for values in self._watched.values():
            for name in values.keys() - kept:
                del values[name]
        self._seen &= kept
        if self._settled is not None:
            self._settled = torch.where(self._units(groups, self._settled), 0.0, self._settled)

    def _whole_step(self) -> tuple[Tensor | None, list[bool]]:
        readers, hooked = self.readers, self.hooked()
        chosen = _names(readers, [not hook for hook in hooked])
        weights = {
            name: reader_terms(layer)
            for name, layer in readers.layers.items()
            if name in chosen and weight_of(layer).grad is not None
        }
        hooks = self._watched.get(0, {})
        seen = [
            not (hooks if hook else weights).keys().isdisjoint(names)
            for hook, names in zip(hooked, readers.of_group, strict=True)
        ]
        by_hook, by_weight = (readers.units(readers.flat(v)) if v else None for v in (hooks, weights))
        terms = by_weight if by_hook is None else by_hook
        if terms is not None and any(hooked) and not all(hooked):
            use = self._units(hooked, terms)
            zero = terms.new_zeros(())  # a reader may serve both kinds of groups, and one kind may be missing
            terms = torch.where(use, zero if by_hook is None else by_hook, zero if by_weight is None else by_weight)
        return (None if terms is None else taylor_2019(terms)), seen


def _names(readers: Readers, groups: Collection[bool]) -> set[str]:
    """Readers of the groups that are marked."""
    return {name for names, marked in zip(readers.of_group, groups, strict=True) if marked for name in names}


def _same_examples(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring ``[examples, channels]`` per reader to as many examples; some layers see several windows of each."""
    examples = min(len(value) for value in values.values())
    odd = next((name for name, value in values.items() if len(value) % examples), None)
    if odd is not None:
        raise ValueError(
            f"`criterion='taylor_2016'` needs the batch on the first axis of every layer's input, but layer {odd!r} "
            f"has {len(values[odd])} there and another one {examples}: choose taylor_2019."
        )
    return {name: value.view(examples, -1, value.shape[-1]).mean(1) for name, value in values.items()}
