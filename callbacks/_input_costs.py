"""What a network costs on the inputs that a fit gives it, found out as early as can be."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

import bsdp
from bsdp.callbacks._evaluation import random_state_kept
from bsdp.callbacks._measuring import (
    FirstInputs,
    NotReplayableError,
    example_of,
    first_example,
    measure_on_batch,
    measure_on_own_example,
    only_network,
)
from bsdp.cost import ModelCost
from bsdp.record import PruningRecord

Measured = tuple[ModelCost, list[list[int]]]  # with the shapes of the network's inputs for one example


class Owner(Protocol):
    """What `InputCosts` needs to know of a pruning callback."""

    settings: Any
    needs_example: bool
    new_bias: bool

    @property
    def record(self) -> PruningRecord:
        """What happened so far."""

    def spends_at_once(self) -> bool:
        """Whether costs count in the first batch already."""

    def set_cost(self, cost: ModelCost, shapes: list[list[int]]) -> None:
        """Take costs that became known after the pruner was built."""


class InputCosts:
    """Measures the network on the module's own example, else on the first batch; then looks at what training gives it.

    Args:
        owner: The callback whose network it is.
    """

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self._guessed = False  # whether costs are not yet those of what training gives the network
        self._first: FirstInputs | None = None
        self._why_unknown = ""

    def without_data(self, pl_module: LightningModule, *, saved: list[list[int]] | None) -> Measured | None:
        """Costs at the start of a fit, without those that need the size of the inputs where nobody tells it.

        Args:
            pl_module: The module.
            saved: The shapes that a resumed run had, for an owner that needs an example.

        Returns:
            None if an example is needed and there is none before the data.
        """
        owner = self.owner
        if pl_module.example_input_array is not None:
            return self._on_own_example(pl_module)
        network = _part(pl_module, only_network(pl_module))
        if saved is not None:
            example = tuple(torch.zeros(shape) for shape in saved)
            return bsdp.measure_cost(network, example, new_bias=owner.new_bias), saved
        if owner.needs_example:
            return None
        return bsdp.measure_cost(network, new_bias=owner.new_bias), []

    def _on_own_example(self, pl_module: LightningModule) -> Measured:
        """Without MACs where the network takes more than tensors and nothing needs them."""
        owner, name = self.owner, only_network(pl_module)
        try:
            return measure_on_own_example(pl_module, name, new_bias=owner.new_bias)
        except NotReplayableError as error:
            if owner.needs_example or owner.settings.target_kind == "macs":
                raise ValueError(f"`{type(owner).__name__}` needs the shape of the input, but {error}.") from error
            rank_zero_warn(f"MACs are not reported: {error}.")
            return bsdp.measure_cost(_part(pl_module, name), new_bias=owner.new_bias), [[0]]

    def on_first_example(self, trainer: Trainer, pl_module: LightningModule) -> Measured:
        """Costs on the first training batch, for an owner that cannot do without.

        Raises:
            ValueError: If the network cannot be measured on it.
        """
        with random_state_kept():  # the same order of the data as beside callbacks that need no example
            batch = first_example(trainer)
        try:
            found = measure_on_batch(pl_module, only_network(pl_module), batch, new_bias=self.owner.new_bias)
        except ValueError as error:
            reason = f"`{type(self.owner).__name__}` needs the shape of the input, but {error}. {_ADVICE}"
            raise ValueError(reason) from error
        self._guessed = True
        return found

    def before_batch(self, pl_module: LightningModule, batch: Any) -> None:
        """Measure on one example of the batch, if nothing was; needed at once for a budget of MACs, else reported."""
        record = self.owner.record
        if self._guessed or record.cost.fixed_macs is not None or record.input_shapes:
            return
        self._guessed = True
        try:
            found = measure_on_batch(pl_module, record.network, batch, new_bias=self.owner.new_bias)
        except ValueError as error:
            if self.owner.settings.target_kind == "macs":
                reason = f"`target_kind: macs` needs the MACs of the network, but {error}. {_ADVICE}"
                raise ValueError(reason) from error
            self._why_unknown = str(error)
        else:
            self.owner.set_cost(*found)

    def watch(self, pl_module: LightningModule) -> None:
        """Note what the network gets next, if that is still to be seen."""
        if self._guessed and self._first is None:
            self._first = FirstInputs(_part(pl_module, self.owner.record.network))

    def after_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether the batch gave the network what was measured, and measure it anew if that can be."""
        if self._first is None:
            return
        shapes = trainer.strategy.broadcast(self._first.shapes)
        self.close()
        self._guessed = False
        known = self.owner.record.input_shapes
        if shapes is None or _sizes(shapes) == _sizes(known):
            shapes = None  # nothing that was not known
        elif (not known or self._may_change()) and self._measure(pl_module, shapes):
            return
        if not known:
            rank_zero_warn(f"MACs are not reported: {self._why_unknown}. {_ADVICE}")
            self.owner.record.input_shapes = [[0]]
        elif shapes is not None:
            seen, guessed = (" and ".join("x".join(map(str, s)) for s in _sizes(each)) for each in (shapes, known))
            rank_zero_warn(
                f"`{type(self.owner).__name__}` measured the network on inputs of {guessed}, the first tensor of a "
                f"batch, but in training it gets {seen}: costs are those of the wrong size. {_ADVICE}"
            )

    def _may_change(self) -> bool:
        return not (self.owner.needs_example or self.owner.spends_at_once())

    def _measure(self, pl_module: LightningModule, shapes: list[list[int]]) -> bool:
        """Whether the network can be measured on inputs of these shapes."""
        part = _part(pl_module, self.owner.record.network)
        try:
            cost = bsdp.measure_cost(part, example_of(shapes, part), new_bias=self.owner.new_bias)
        except Exception as error:  # whatever the user's network may raise without its further arguments
            self._why_unknown = self._why_unknown or f"the network fails on what it seems to get ({error})"
            return False
        self.owner.set_cost(cost, shapes)
        return True

    def close(self) -> None:
        """Watch no more."""
        if self._first is not None:
            self._first.close()
            self._first = None


def _part(pl_module: LightningModule, name: str) -> nn.Module:
    return pl_module.get_submodule(name) if name else pl_module


def _sizes(shapes: list[list[int]]) -> list[list[int]]:
    return [shape[1:] for shape in shapes]


_ADVICE = "Set `example_input_array` in the LightningModule to one example."
