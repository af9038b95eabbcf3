"""Which of several compressed networks is closest to the original, on examples that were held out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bsdp.calibration_data import CalibrationData, Examples
from bsdp.double_pruner import output_change
from bsdp.output_scores import example_outputs
from bsdp.probing import evaluating
from bsdp.recalibration import recalibrate_batch_norms

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A compressed network, how it came to be, and how it compares with the original."""

    network: nn.Module
    compensated: bool
    recalibrated: bool
    change: float
    agreement: float | None


@dataclass
class CandidateChoice:
    """Compressed networks to choose from; those that fail are left out as long as another one does not.

    Attributes:
        wanted: The outputs of the original on held-out examples.
        found: The examples.
        batch_size: Examples in a forward pass.
        device: That of the networks.
        recalibrate: As in `compress`.
        say: Told what is left out.
        networks: By whether they were fitted.
        failures: Why others were left out.
    """

    wanted: Tensor
    found: CalibrationData
    batch_size: int
    device: torch.device
    recalibrate: bool | str
    say: Progress
    networks: dict[bool, nn.Module] = field(default_factory=dict)
    failures: list[Exception] = field(default_factory=list)

    @contextmanager
    def leaving_out(self) -> Iterator[None]:
        """Note an error in place of raising it."""
        try:
            yield
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # not listed
            self.failures.append(error)
            self.say(f"left out a network: {error}")

    def best(self) -> Candidate:
        """The network closest to the original; recalibrated ones too, if that is asked for."""
        candidates = []
        for compensated, network in self.networks.items():
            if self.recalibrate is not True:
                with self.leaving_out():
                    candidates.append(self._compared(network, compensated, False))
            if self.recalibrate:
                with self.leaving_out():
                    other = copy.deepcopy(network)
                    if self._recalibrated(other) or self.recalibrate is True:
                        candidates.append(self._compared(other, compensated, True))
        if not candidates:
            reasons = "; ".join(dict.fromkeys(str(error).rstrip(".") for error in self.failures))
            raise ValueError(
                f"no compressed network is fit for use ({reasons}): try other values of `compensate` and "
                "`recalibrate`, a smaller `target`, or float32 (`model.float()`)."
            ) from self.failures[0]
        return min(candidates, key=lambda candidate: candidate.change)

    def _recalibrated(self, network: nn.Module) -> list[str]:
        # Batches of many examples: a batch's own statistics are noise otherwise.
        batches = self.found.seen.batches(4 * self.batch_size, self.device)
        return recalibrate_batch_norms(network, (inputs for inputs, _ in batches))

    def _compared(self, network: nn.Module, compensated: bool, recalibrated: bool) -> Candidate:
        outputs = outputs_of(network, self.found.held_out, self.batch_size, self.device)
        if not outputs.isfinite().all():
            raise ValueError("NaN or infinity in its outputs.")
        change, agreement = output_change(self.wanted, outputs), _agreement(self.wanted, outputs)
        return Candidate(network, compensated, recalibrated, change, agreement)


def outputs_of(model: nn.Module, examples: Examples, batch_size: int, device: torch.device) -> Tensor:
    """A network's outputs on examples, in eval mode.

    Raises:
        ValueError: If they are no tensor with an axis for the examples.
    """
    with evaluating(model):
        outputs = [example_outputs(model(*inputs)) for inputs, _ in examples.batches(batch_size, device)]
    if any(output is None for output in outputs):
        raise ValueError(
            "`model` gives no tensor of numbers with an axis for the examples: its outputs cannot be compared."
        )
    return torch.cat([output for output in outputs if output is not None])


def _agreement(before: Tensor, after: Tensor) -> float | None:
    if before.dim() != 2 or before.shape[1] < 2:
        return None
    return float((before.argmax(1) == after.argmax(1)).double().mean())
