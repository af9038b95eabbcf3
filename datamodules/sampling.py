"""A training order that a resumed run can take up exactly where it was left.

Lightning saves no random state and no position in the data. Here the order is a function of (seed, epoch), the sampler
tells the data set the epoch of every image it asks for, and the loader leaves out the batches that the epoch has seen.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Batch = tuple[Tensor, Tensor]
Key = int | tuple[int, int]


def seed_for(*words: int) -> int:
    """Mix whole numbers into one seed; near ones give unrelated streams."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def generator_for(*words: int) -> torch.Generator:
    """Make a generator whose stream depends on all `words`, and on nothing else."""
    return torch.Generator().manual_seed(seed_for(*words))


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Shuffled pairs (epoch, index), the same in every process and in every run with the same seed.

    It is a ``DistributedSampler`` so that a trainer leaves it alone and calls ``set_epoch``; the pairs carry the epoch
    into worker processes, also into those that live longer than an epoch.

    Args:
        dataset: Anything with a length.
        seed: Seed of the order.
        num_replicas: Processes that share the data.
        rank: Which of them this is.
    """

    def __init__(self, dataset: Dataset[Any], *, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        count = len(self.dataset)  # type: ignore[arg-type]  # torch types `Dataset` without a length
        order = torch.randperm(count, generator=generator_for(self.seed, self.epoch))
        # Every process gets the same number of images: the first ones are repeated.
        order = order.repeat(-(-self.total_size // count))[: self.total_size]
        mine = order[self.rank :: self.num_replicas][self.start :]
        return ((self.epoch, index) for index in mine.tolist())


class TrainingLoader(DataLoader[Batch]):
    """A loader that a trainer can take up in the middle of an epoch.

    ``position`` gives the running epoch and how many of its batches are done, or None where nobody knows. A data
    module points it at the trainer's own counts: they are right after a resume from any checkpoint, and after an
    exception in the middle of a step. (The epoch that the trainer gives to ``set_epoch`` is one too high after a
    resume from an epoch's end under ``max_steps``.)
    """

    position: Callable[[], tuple[int, int] | None] = staticmethod(lambda: None)
    _saved: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch names its private iterator class
        # The trainer asks for its iterator right after `load_state_dict`. Whoever else reads this loader, a callback
        # that collects statistics for example, gets every batch.
        saved, self._saved = self._saved, None
        return self._batches(saved)

    def _batches(self, saved: dict[str, int] | None) -> Iterator[Batch]:
        # A generator runs at the first `next`. The trainer makes its iterator before it knows where it is; with worker
        # processes the first batches would otherwise be fetched in the order of another epoch.
        position = self.position()
        if position is not None and isinstance(self.sampler, EpochSampler):
            epoch, done = position
            if saved is not None and done:
                self._check(saved)
            self.sampler.set_epoch(epoch)
            self.sampler.start = 0 if saved is None else done * (self.batch_size or 0)
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Give what the order inside an epoch depends on; being there also tells the trainer that it can resume."""
        return {
            "batch_size": int(self.batch_size or 0),
            "images": len(self.sampler),  # type: ignore[arg-type]  # torch types samplers without a length
            "seed": getattr(self.sampler, "seed", 0),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iterator leave out the batches that are done.

        Args:
            state: What ``state_dict`` gave when the checkpoint was written. If that was in the middle of an epoch,
                other settings now are a ``ValueError`` when the iterator starts.
        """
        self._saved = state

    def _check(self, saved: dict[str, int]) -> None:
        for name, now in self.state_dict().items():
            if saved.get(name, now) != now:
                raise ValueError(
                    f"The checkpoint was written in the middle of an epoch with {name} = {saved[name]}, this run has "
                    f"{now}: the rest of the epoch would not be the same batches. Give the data module the settings of "
                    "that run (its `config.yaml` holds them), or resume from a checkpoint written at an epoch's end."
                )


def as_is(batch: Batch) -> Batch:
    """Collate nothing: the data sets here give whole batches."""
    return batch
