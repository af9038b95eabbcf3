"""`SourcePretraining`: train the network on picked images of a source before it is transferred."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from bsdp._checks import check_at_least, check_choice, check_whole
from bsdp.callbacks._comparison import fold_network, network_of
from bsdp.callbacks._evaluation import random_state_kept
from bsdp.callbacks._measuring import as_parameters, only_network
from bsdp.callbacks._trainer_checks import refuse_unsupported
from bsdp.decompose import find_head
from bsdp.heads import head_outputs
from bsdp.layers import named_pairs
from bsdp.pretraining import Batch, PretrainingEpoch, pretrain, take_over


class SourceData(Protocol):
    """What the data module must offer beside the data of the fit."""

    @property
    def source_num_classes(self) -> int:
        """Number of the source's classes."""

    def source_train_dataloader(self) -> Any:
        """Give batches of source images and labels."""


class SourcePretraining(Callback):
    """Train the network on the source images of the data module, once, before the fit.

    For `bsdp.datamodules.ConditionalSourceDataModule`, or any data module with ``source_train_dataloader()`` and
    ``source_num_classes``. The pretraining is supervised, by the source's labels, on a new head that is thrown away;
    all other weights train, from those the module has. It takes place on a plain copy, so other callbacks may have
    decomposed and frozen the module. Nothing is logged; every epoch prints a line. A resumed fit does not pretrain
    again, and the random state of the run is the same with and without it.

    PUBLISHED (Chakraborty et al., arXiv 2011.10231, abstract): supervised or unsupervised pretraining on a filtered
    subset at a lower resolution, or tuning of a pretrained network on it. RECONSTRUCTION, ours: only the supervised
    form, and the recipe, SGD on one cycle of the learning rate.

    Args:
        epochs: Epochs on the source images.
        learning_rate: The highest one of the cycle.
        weight_decay: Of weights; biases and normalisation layers have none.
        precision: ``float32``, or ``bfloat16`` for bfloat16 arithmetic on 32-bit weights.
        seed: Seed of the head and of dropout. Default: the seed of the run, else 0.
    """

    def __init__(
        self,
        *,
        epochs: int = 20,
        learning_rate: float = 0.1,
        weight_decay: float = 0.0005,
        precision: Literal["float32", "bfloat16"] = "float32",
        seed: int | None = None,
    ) -> None:
        check_whole("epochs", epochs, 1)
        check_at_least("weight_decay", weight_decay, 0.0)
        if not isinstance(learning_rate, (int, float)) or not 0.0 < learning_rate < float("inf"):
            raise ValueError(f"`learning_rate` must be above 0 and finite, got {learning_rate!r}.")
        check_choice("precision", precision, ("float32", "bfloat16"))
        if seed is not None:
            check_whole("seed", seed, 0)
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.precision = precision
        self.seed = seed
        self._done = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a data module without a source, before anything runs."""
        if stage != "fit":
            return
        self._done = False  # another fit starts anew
        refuse_unsupported(trainer, self)
        data = getattr(trainer, "datamodule", None)
        missing = [name for name in ("source_train_dataloader", "source_num_classes") if not hasattr(data, name)]
        if missing:
            raise ValueError(
                f"`SourcePretraining` needs a data module that gives source images, and {type(data).__name__} has no "
                f"`{missing[0]}`. Put it as the target into `bsdp.datamodules.ConditionalSourceDataModule`, with a "
                "source beside it, or leave `SourcePretraining` out."
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note that the weights come from a fit that was under way, whether or not it had this callback."""
        self._done = checkpoint.get("global_step", 0) > 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note whether the pretraining is in the checkpoint's weights."""
        self._done = self._done or bool(state_dict["done"])

    def state_dict(self) -> dict[str, Any]:
        """Tell whether the weights of now have been pretrained."""
        return {"done": self._done}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pretrain, when weights have been loaded and before the first validation."""
        if self._done or trainer.global_step > 0:
            rank_zero_info("bsdp: no pretraining on the source, the fit goes on from weights that had theirs")
            return
        name = only_network(pl_module)
        network = network_of(pl_module, name)
        _refuse_pruned(network)
        trained = fold_network(pl_module, name)
        head = _head_of(trained)
        with random_state_kept():
            self._pretrain(trainer, trained, head)
        # Sums on several devices may differ in the last bit, and DDP compares weights only when it wraps.
        trained.load_state_dict(trainer.strategy.broadcast(trained.state_dict()))
        take_over(network, trained, head=head)
        self._done = True

    def _pretrain(self, trainer: Trainer, network: nn.Module, head: str) -> None:
        data = cast(SourceData, trainer.datamodule)  # type: ignore[attr-defined]
        loader = data.source_train_dataloader()
        dry = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        epochs, steps = (1, 1) if dry else (self.epochs, len(loader))
        rank_zero_info(
            f"bsdp: pretraining on {len(loader.sampler):,} source images of {data.source_num_classes} classes, "
            f"{epochs} epochs of {steps} batches"
        )
        started = time.monotonic()

        def batches(epoch: int) -> Iterator[Batch]:
            if hasattr(loader.sampler, "set_epoch"):
                loader.sampler.set_epoch(epoch)
            for images, labels in islice(loader, steps):
                moved = as_parameters(images, network)
                yield moved, labels.to(moved.device)

        def show(epoch: int, result: PretrainingEpoch) -> None:
            rank_zero_info(
                f"bsdp: pretraining epoch {epoch + 1}/{epochs} ({time.monotonic() - started:.0f} s): "
                f"loss {result.loss:.4f}, accuracy {result.accuracy:.4f}"
            )

        _refuse_unfit(network, next(batches(0))[0])
        device = next(network.parameters()).device
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"), torch.enable_grad():
            pretrain(
                network,
                batches,
                head=head,
                num_classes=data.source_num_classes,
                epochs=epochs,
                steps=steps,
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                seed=seed,
                on_epoch=show,
            )


def _refuse_pruned(network: nn.Module) -> None:
    cut = [name for name, pair in named_pairs(network).items() if pair.rank < pair.full_rank]
    if cut:
        raise ValueError(
            f"`SourcePretraining` comes before pruning, but {len(cut)} layers (first: {cut[0]!r}) have lost bases. "
            "Leave it out to go on with this model, or start from one that was not pruned."
        )


def _head_of(network: nn.Module) -> str:
    """Name of the last layer of a plain network, if one for other classes can stand in its place."""
    head = find_head(network)
    layer = None if head is None else network.get_submodule(head)
    if head is None or layer is None or head_outputs(layer) is None:
        raise ValueError(
            "`SourcePretraining` puts a head for the source's classes in the place of the network's last layer, which "
            f"must be a linear layer or a 1x1 convolution; here it is {head!r} ({type(layer).__name__})."
        )
    return head


@torch.no_grad()
def _refuse_unfit(network: nn.Module, images: Tensor) -> None:
    """Show the network some source images, which may be smaller than those it was made for."""
    try:
        network.eval()(images)
    except Exception as error:  # whatever a network may raise
        raise ValueError(
            f"`SourcePretraining`: the network does not take the source's images, {list(images.shape[1:])} "
            f"({type(error).__name__}: {error}). Give the source the `image_size` and channels of the target."
        ) from error
