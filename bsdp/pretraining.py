"""Pretraining a network on images of another task, with a head of its own for the time being."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsdp._checks import check_at_least, check_whole
from bsdp.decompose import decompose
from bsdp.heads import head_outputs, replace_head
from bsdp.layers import named_pairs
from bsdp.training import onecycle_factor, parameter_groups

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PretrainingEpoch:
    """What one epoch of `pretrain` gave on its own training images.

    Attributes:
        loss: Mean cross entropy.
        accuracy: Share of right labels.
        images: Images seen.
    """

    loss: float
    accuracy: float
    images: int


def pretrain(
    network: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    *,
    head: str,
    num_classes: int,
    epochs: int,
    steps: int,
    learning_rate: float = 0.1,
    weight_decay: float = 0.0005,
    seed: int = 0,
    on_epoch: Callable[[int, PretrainingEpoch], None] | None = None,
) -> list[PretrainingEpoch]:
    """Train a plain network, in place, on a task with other classes; afterwards it has its own head back.

    All weights train, by SGD with Nesterov momentum 0.9 on one cycle of the learning rate.

    Args:
        network: Gives class scores ``[batch, its classes]``. Left in train mode.
        batches: Gives the batches of an epoch: images ``[batch, ...]`` and labels ``[batch]``, on the network's device.
        head: Dotted name of the layer that gives the class scores, linear or a 1x1 convolution. A new one with random
            weights stands in its place while this runs.
        num_classes: Classes of the pretraining.
        epochs: Number of epochs.
        steps: Batches in an epoch, for the learning rate.
        learning_rate: The highest one of the cycle.
        weight_decay: Of weights; biases and normalisation layers have none.
        seed: Seed of the new head and of dropout. The global random state is as before afterwards.
        on_epoch: Called after every epoch with its number, from 0, and what it gave.

    Returns:
        What every epoch gave.

    Raises:
        ValueError: If a setting is out of range, the head is of another kind, a label is beyond `num_classes`, or the
            loss is not finite any more.
    """
    check_whole("epochs", epochs, 1)
    check_whole("steps", steps, 1)
    check_at_least("weight_decay", weight_decay, 0.0)
    if not 0.0 < learning_rate < float("inf"):
        raise ValueError(f"`learning_rate` must be above 0 and finite, got {learning_rate}.")
    own = network.get_submodule(head)
    if head_outputs(own) is None:
        raise ValueError(f"`head` must be a linear layer or a 1x1 convolution, {head!r} is a {type(own).__name__}.")
    done: list[PretrainingEpoch] = []
    with _seeded(network, seed):
        try:
            replace_head(network, head, num_classes=num_classes)
            groups = parameter_groups(network, head=network.get_submodule(head))
            optimizer = torch.optim.SGD(
                groups, lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay
            )
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: onecycle_factor(step, total=max(2, epochs * steps))
            )
            for epoch in range(epochs):
                done.append(_train_epoch(network.train(), batches(epoch), optimizer, schedule, num_classes))
                if on_epoch is not None:
                    on_epoch(epoch, done[-1])
        finally:
            _put_back(network, head, own)
    return done


def take_over(network: nn.Module, trained: nn.Module, *, head: str) -> None:
    """Give a network, in place, the weights that a plain copy of it has by now; all but those of the head.

    Pairs are computed anew from the copy's layers, so the network must still have all its bases. Parameters stay the
    same objects, so an optimizer that holds them goes on holding them.

    Args:
        network: Plain or decomposed at full rank.
        trained: From `bsdp.fold` of it, with other weights. It is decomposed on the way.
        head: Dotted name of the layer that keeps its own weights.

    Raises:
        ValueError: If the network has lost bases.
    """
    names = [name for name in named_pairs(network) if name != head]
    cut = [name for name, pair in named_pairs(network).items() if pair.rank < pair.full_rank]
    if cut:
        raise ValueError(f"`network` was pruned: {len(cut)} layers (first: {cut[0]!r}) cannot hold other weights.")
    if names:
        decompose(trained, include=names)
    own = network.state_dict()
    new = {key: value for key, value in trained.state_dict().items() if not f"{key}.".startswith(f"{head}.")}
    network.load_state_dict(own | {key: value for key, value in new.items() if key in own})


def _train_epoch(
    network: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    num_classes: int,
) -> PretrainingEpoch:
    loss_sum, right, seen = 0.0, 0, 0
    for images, labels in batches:
        if int(labels.max()) >= num_classes:
            raise ValueError(f"`num_classes` is {num_classes}, but a batch has the label {int(labels.max())}.")
        logits = network(images).float()
        loss = F.cross_entropy(logits, labels)
        if not loss.isfinite():
            raise ValueError("the loss is not finite any more: lower `learning_rate`, or check the images.")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        optimizer.step()
        schedule.step()
        loss_sum += float(loss.detach()) * len(labels)
        right += int((logits.argmax(1) == labels).sum())
        seen += len(labels)
    if not seen:
        raise ValueError("`batches` gave no batch.")
    return PretrainingEpoch(loss_sum / seen, right / seen, seen)


def _put_back(network: nn.Module, head: str, own: nn.Module) -> None:
    new = network.get_submodule(head)
    if new is own:
        return
    network.set_submodule(head, own)
    if isinstance(getattr(network, "num_classes", None), int):  # as `replace_head` does
        setattr(network, "num_classes", head_outputs(own))  # noqa: B010


@contextlib.contextmanager
def _seeded(network: nn.Module, seed: int) -> Iterator[None]:
    devices = {parameter.device for parameter in network.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield
