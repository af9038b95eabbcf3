"""Scores of channels by group: a class that collects, for the formulas in `bsdp.channel_criteria`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bsdp import channel_criteria as criteria
from bsdp._checks import check_choice
from bsdp.channel_group import ChannelGroup
from bsdp.channel_terms import StepTerms
from bsdp.channel_watching import Readers, by_example, widened
from bsdp.compiling import uncompiled
from bsdp.importance import NoScoresError
from bsdp.input_watching import watch_inputs

CRITERIA = (
    "taylor_2016",
    "taylor_2019",
    "l1",
    "l2",
    "fpgm",
    "bn_scale",
    "activation_cumsum",
    "channel_scaling",  # its scores are factors that train in the model, so `ChannelScores` does not know it
    "random",
)
_SCORED = tuple(name for name in CRITERIA if name != "channel_scaling")


class ChannelScores:
    """Scores the channels of a model by group.

    For criteria with `needs_gradients`, call `update` once per optimizer step, after the backward pass and before
    clipping and stepping (unscaled under mixed precision). A step with a NaN or infinite term counts for nothing. For
    those with `needs_hooks`, keep `collecting` open during some or all of the batches; a group that needs hooks counts
    only the steps in which they saw something.

    Args:
        model: The model of the groups, plain or decomposed. Its own forward is what a batch calls.
        groups: From `bsdp.channel_graph.channel_groups`.
        criterion: ``"taylor_2016"``, ``"taylor_2019"``, ``"l1"``, ``"l2"``, ``"fpgm"``, ``"bn_scale"``,
            ``"activation_cumsum"`` (mean activation; `bsdp.channel_criteria.kept_by_cumsum` cuts it) or ``"random"``.
        normalize: ``"none"``, ``"l2"``, ``"mean"`` or ``"auto"``, per group; see
            `bsdp.channel_criteria.normalize_scores`.
        seed: Of ``"random"``, whose scores are drawn anew by every `compute`.

    Raises:
        ValueError: If an argument is not allowed, or ``"bn_scale"`` finds no batch norm.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, ChannelGroup],
        *,
        criterion: str,
        normalize: str = "auto",
        seed: int = 0,
    ) -> None:
        check_choice("criterion", criterion, _SCORED)
        check_choice("normalize", normalize, criteria.NORMALIZATIONS)
        self.model, self.criterion, self.normalize = model, criterion, normalize
        self._generator = torch.Generator().manual_seed(seed)
        self.rebind(groups)
        if criterion == "bn_scale" and not criteria.data_free_scores(model, groups, criterion):
            raise ValueError(
                "`criterion='bn_scale'` needs batch norm with a scale behind the channels, and this model has none: "
                "choose l1 or taylor_2019."
            )

    @property
    def needs_gradients(self) -> bool:
        """Whether `update` must be called with gradients in place."""
        return self.criterion in ("taylor_2016", "taylor_2019")

    @property
    def needs_hooks(self) -> bool:
        """Whether `collecting` must be open on some batches."""
        return self.criterion == "activation_cumsum" or (self.needs_gradients and any(self._terms.hooked()))

    def rebind(self, groups: Mapping[str, ChannelGroup]) -> None:
        """Go on with the groups of the model as it is after a cut, and forget everything collected."""
        self.groups = dict(groups)
        self._readers = Readers(self.model, groups)
        self._terms = StepTerms(self._readers, per_example=self.criterion == "taylor_2016")
        self.reset()

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters, by group, of the layers that read it, whose gradients its terms are made of."""
        layers, readers = self._readers.layers, zip(self.groups, self._readers.of_group, strict=True)
        return {group: [p for name in names for p in layers[name].parameters()] for group, names in readers}

    def reset(self) -> None:
        """Forget everything collected."""
        self._terms.clear()
        self._sum: Tensor | None = None  # per unit; of "activation_cumsum" per input channel of the readers
        self._steps: Tensor | None = None  # per group; of "activation_cumsum" examples per reader

    def _zeros(self) -> tuple[Tensor, Tensor]:
        readers, device = self._readers, next(self.model.parameters()).device
        sizes = list(readers.widths.values()) if self.criterion == "activation_cumsum" else readers.sizes
        return torch.zeros(sum(sizes), device=device), torch.zeros(len(sizes), device=device)

    # --- collecting

    @contextmanager
    def collecting(self, scale: float = 1.0) -> Iterator[None]:
        """Watch one batch, forward and backward, inside the ``with`` block.

        Args:
            scale: What the loss is multiplied by under mixed precision; gradients are divided by it.
        """
        handles = self.attach(scale)
        try:
            with uncompiled():
                yield
        finally:
            for handle in handles:
                handle.remove()
        self._terms.settle()

    def attach(self, scale: float = 1.0) -> list[Any]:
        """Add the hooks and return their handles, for callers whose start and end are different events.

        Compiled graphs do not call hooks that were added later: run such a model in `bsdp.compiling.uncompiled`.
        """
        if self.criterion == "activation_cumsum":
            layers = self._readers.layers
            return [watch_inputs(layer, self._activation_sink(name)) for name, layer in layers.items()]
        return self._terms.attach(self.model, scale) if self.needs_gradients else []

    def _activation_sink(self, name: str) -> Callable[[Tensor], None]:
        readers = self._readers
        layer, start = readers.layers[name], readers.offsets[name]
        number = list(readers.layers).index(name)

        def add(inputs: Tensor) -> None:
            if readers is not self._readers:
                return  # hooks from before a cut
            if self._sum is None or self._steps is None:
                self._sum, self._steps = self._zeros()
            values = by_example(layer, widened(inputs.detach()).relu())
            finite = values.isfinite().all()
            self._sum[start : start + values.shape[1]] += torch.where(finite, values.sum(0), 0.0)
            self._steps[number] += finite * len(values)

        return add

    @torch.no_grad()
    def update(self, groups: Sequence[bool] | None = None) -> None:
        """Add the terms of one optimizer step: of the gradients that stand now, and of what the hooks saw.

        Args:
            groups: Which groups the step is one of, where several optimizers share a model; None for all.
        """
        if not self.needs_gradients:
            return
        value, seen = self._terms.take(groups)
        if value is None or not any(seen):
            return  # a step that did not concern these layers, or was not watched
        finite = value.isfinite().all()
        value = torch.where(finite, value, 0.0)
        steps = finite * torch.tensor(seen, dtype=torch.float32).to(value.device, non_blocking=True)
        self._sum = value if self._sum is None else self._sum + value
        self._steps = steps if self._steps is None else self._steps + steps

    # --- results

    @torch.no_grad()
    def compute(self) -> dict[str, Tensor]:
        """Score every unit.

        Returns:
            ``{group name: [units]}``, float32. Groups that have nothing to score by are left out: without batch norm
            for ``"bn_scale"``, or whose readers took no part in any step.

        Raises:
            NoScoresError: If nothing finite was collected, or a score is NaN or infinite.
        """
        scores = {
            name: criteria.normalize_scores(score, self.normalize, criterion=self.criterion).float()
            for name, score in self._compute().items()
        }
        if not scores:
            raise NoScoresError(self._advice())
        broken = next((name for name, score in scores.items() if not score.isfinite().all()), None)
        if broken is not None:
            raise NoScoresError(f"scores are NaN or infinite (first in group {broken!r}): the loss is exploding.")
        return scores

    def _advice(self) -> str:
        hooks = " with `collecting` open during some batches" if self.needs_hooks else ""
        if self.needs_gradients:
            return f"no finite gradient was accumulated: call `update` after each backward pass{hooks}."
        return f"no finite activation was seen: run the model{hooks}."

    def _compute(self) -> dict[str, Tensor]:
        if self.criterion == "random":
            return {name: torch.rand(group.size, generator=self._generator) for name, group in self.groups.items()}
        if self.criterion in criteria.DATA_FREE:
            return criteria.data_free_scores(self.model, self.groups, self.criterion)
        if self._sum is None or self._steps is None:
            return {}
        if self.criterion == "activation_cumsum":
            return self._activations(self._sum, self._steps)
        parts = zip(self.groups, torch.split(self._sum, self._readers.sizes), self._steps, strict=True)
        return {name: total / steps for name, total, steps in parts if steps > 0}

    def _activations(self, sums: Tensor, examples: Tensor) -> dict[str, Tensor]:
        readers = self._readers
        counts = examples.repeat_interleave(torch.tensor(list(readers.widths.values()), device=examples.device))
        seen = readers.units((counts > 0).float(), mean=True)  # readers that took part, per unit
        means = readers.units(torch.where(counts > 0, sums / counts, 0.0), mean=True) / seen
        parts = zip(self.groups, torch.split(means, readers.sizes), torch.split(seen, readers.sizes), strict=True)
        return {name: mean for name, mean, number in parts if (number > 0).all()}

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by their mean over processes, so that all of them take the same decision."""
        if not self.needs_gradients and self.criterion != "activation_cumsum":
            return
        # A process without any finite step joins with zeros: all must make the same calls.
        sums, steps = self._zeros()
        self._sum = reduce(sums if self._sum is None else self._sum)
        self._steps = reduce(steps if self._steps is None else self._steps)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint, to be taken between optimizer steps."""
        return {
            "criterion": self.criterion,
            "sizes": {name: group.size for name, group in self.groups.items()},
            "sum": None if self._sum is None else self._sum.clone(),
            "steps": None if self._steps is None else self._steps.clone(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; criterion and groups must be those it was taken with."""
        if state["criterion"] != self.criterion:
            raise ValueError(
                f"the saved scores are of the criterion {state['criterion']!r}, these of {self.criterion!r}."
            )
        if state["sizes"] != {name: group.size for name, group in self.groups.items()}:
            raise ValueError(
                "the saved channel scores belong to a model of other groups: `rebind` to its groups first."
            )
        self.reset()
        like, _ = self._zeros()
        self._sum, self._steps = (
            None if state[k] is None else state[k].to(like.device, copy=True) for k in ("sum", "steps")
        )
        self._generator.set_state(state["generator"].cpu())
