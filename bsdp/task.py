"""`TransferTask`: transfer a pretrained backbone to a new classification task."""

import math
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import Self

from bsdp._checks import check_choice, check_normalization, check_whole
from bsdp.artifacts import IMAGES
from bsdp.backbones import HeadKind, build_backbone
from bsdp.layers import BasisPair
from bsdp.training import cosine_factor, onecycle_factor, parameter_groups, restarted_factor
from bsdp.weight_files import no_weight_files

Schedule = Literal["constant", "cosine", "onecycle"]
Batch = tuple[Tensor, Tensor]


class TransferTask(LightningModule):
    """Transfer a pretrained backbone to a new classification task.

    The plain network is `network`; everything that has parameters is in it. Weight decay is left out for biases, for
    normalisation layers and for the scaling factors of a decomposed network.

    | logged key                     | when             | what                                          |
    | ------------------------------ | ---------------- | --------------------------------------------- |
    | ``train_loss``                 | every epoch      | mean loss of the training batches             |
    | ``val_loss``, ``val_accuracy`` | every validation | loss without smoothing, share of right labels |
    | ``test_loss``, ``test_accuracy`` | every test     | the same on the test images                   |

    Args:
        backbone: ``bsdp:NAME``, ``torchvision:NAME`` or ``timm:NAME``; see `bsdp.backbones.list_backbones`.
        num_classes: Outputs of the new head. None: the command line takes the number from the data; elsewhere the head
            that comes with the weights is kept.
        weights: ``default`` for the bundled or published weights, the name of other published ones, a file
            (``.safetensors`` or ``.pth``; also looked up below ``BSDP_DATA``), or ``none`` for random weights.
        head: ``original`` replaces the last layer, ``pool_linear`` the whole head of VGG and AlexNet by global average
            pooling and a linear layer, ``pretrained`` keeps the head and its weights.
        optimizer: Builds the optimizer from parameter groups.
        lr_scheduler: ``constant``, ``cosine`` (rises for 5 % of the steps, then falls to 0), ``onecycle`` (rises for
            30 %), or any scheduler class. The named ones stretch over the whole training.
        lr_interval: How often a scheduler given as a class steps.
        lr_restart_epoch: Epoch at which a named schedule, which has come to its end by then, starts anew over the
            epochs that are left: with the epoch of the first cut, pruning starts from a network that has converged.
            None: one schedule over the whole training.
        head_lr: Learning rate of the head; None for the optimizer's own.
        scale_lr: Learning rate of the scaling factors; None for the optimizer's own.
        label_smoothing: Share of every label that is spread over all classes, in [0, 1).
        channels_last: Store the weights with channels last, which is often faster.
        normalization: Lists ``mean`` and ``std`` for the images; None for those of the pretraining.
    """

    def __init__(
        self,
        backbone: str = "bsdp:resnet20",
        num_classes: int | None = None,
        *,
        weights: str | None = "default",
        head: HeadKind = "original",
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(
            params, lr=0.05, momentum=0.9, weight_decay=0.0005, nesterov=True
        ),
        lr_scheduler: Schedule | LRSchedulerCallable = "cosine",
        lr_interval: Literal["step", "epoch"] = "epoch",
        lr_restart_epoch: int | None = None,
        head_lr: float | None = None,
        scale_lr: float | None = None,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        normalization: dict[str, list[float]] | None = None,
    ) -> None:
        super().__init__()
        _check(lr_scheduler, head_lr, scale_lr, label_smoothing)
        check_choice("lr_interval", lr_interval, ("step", "epoch"))
        _check_restart(lr_restart_epoch, lr_scheduler)
        check_normalization(normalization)
        built = build_backbone(backbone, num_classes=num_classes, weights=weights, head=head)
        if built.num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2 for a classification, got {built.num_classes}.")
        self.network = built.network
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.backbone = backbone
        self.head_name = built.head
        self.num_classes = built.num_classes
        self.image_size = built.image_size
        self.normalization = normalization or built.normalization
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.lr_restart_epoch = lr_restart_epoch
        self.head_lr = head_lr
        self.scale_lr = scale_lr
        self.label_smoothing = label_smoothing
        self.val_accuracy = MulticlassAccuracy(self.num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(self.num_classes, average="micro")
        self._labels_are_known = False
        self._save_plain_hyperparameters()

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Self:
        """Load a task from a checkpoint, pruned or not; the pretrained weight file is not needed for it.

        Args:
            *args: As in ``LightningModule.load_from_checkpoint``; the path comes first.
            **kwargs: As there; ``weights_only`` is True by default, for nothing in our checkpoints needs more.
        """
        kwargs.setdefault("weights_only", True)
        with no_weight_files():
            return super().load_from_checkpoint(*args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write what the images are, and a changed network's structure if no callback did (``save_weights_only``)."""
        from bsdp.diff_pruning import SparseDelta
        from bsdp.structure import shape_of, structure_of

        if shape_of(self) or any(isinstance(module, (BasisPair, SparseDelta)) for module in self.modules()):
            checkpoint.setdefault("bsdp", structure_of(self))
        data = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        shape, names = getattr(data, "image_shape", None), getattr(data, "class_names", None)
        if shape is not None:  # for programs that read the checkpoint without the data
            facts = {"shape": list(shape), "class_names": None if names is None else [str(name) for name in names]}
            checkpoint[IMAGES] = facts

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the network the structure of the checkpoint, before Lightning loads the weights.

        Raises:
            ValueError: If structure or weights do not fit; the network is then as it was.
        """
        from bsdp.structure import rebuild_for

        if "bsdp" not in checkpoint and any(isinstance(module, BasisPair) for module in self.modules()):
            raise ValueError(
                "`ckpt_path`: the checkpoint is of a run without decomposition, so a run that decomposes cannot "
                "continue it. Start a new run with its weights: `--model.weights CHECKPOINT`."
            )
        # Without a trainer this is `load_from_checkpoint`, which checks the names afterwards by its own `strict`.
        strict = self.strict_loading and self._trainer is not None
        rebuild_for(self, checkpoint, strict=strict, source="`ckpt_path`: the checkpoint")

    def setup(self, stage: str) -> None:
        """Compare the number of classes with that of the data, if the data tell.

        Args:
            stage: Not used.

        Raises:
            ValueError: If they differ.
        """
        data = getattr(self.trainer, "datamodule", None)
        found = getattr(data, "num_classes", None)
        self._labels_are_known = found is not None
        if found is not None and found != self.num_classes:
            raise ValueError(
                f"`num_classes` is {self.num_classes}, but {type(data).__name__} has {found} classes. Set "
                f"`model.init_args.num_classes: {found}`, or leave it out: the command line takes it from the data."
            )

    def forward(self, images: Tensor) -> Tensor:
        """Give the class scores (before softmax), ``[batch, num_classes]``."""
        return cast(Tensor, self.network(images))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute and log the loss of one batch."""
        images, labels = batch
        self._check_labels(labels)
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy on validation images."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy on test images."""
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Give ``probabilities`` ``[batch, num_classes]`` and the most probable ``labels`` ``[batch]``."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        probabilities = self(images).float().softmax(dim=1)
        return {"probabilities": probabilities, "labels": probabilities.argmax(dim=1)}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule over what requires a gradient."""
        optimizer = self.optimizer(self.parameter_groups())
        if self.lr_scheduler == "constant":
            return optimizer
        if callable(self.lr_scheduler):
            scheduler = self.lr_scheduler(optimizer)
            config: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_interval}
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                config["monitor"] = getattr(scheduler, "monitor", "val_loss")
        else:
            config = {"scheduler": self._named_scheduler(optimizer), "interval": "step"}
        return cast(OptimizerLRScheduler, {"optimizer": optimizer, "lr_scheduler": config})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Sort the trainable parameters into named groups, see `bsdp.training.parameter_groups`."""
        head = self.network.get_submodule(self.head_name)
        return parameter_groups(self.network, head=head, head_lr=self.head_lr, scale_lr=self.scale_lr)

    def _named_scheduler(self, optimizer: Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError(
                f"`lr_scheduler: {self.lr_scheduler}` stretches over the whole training: set `trainer.max_epochs` or "
                "`trainer.max_steps`, or use `lr_scheduler: constant`."
            )
        total = max(1, int(steps))
        factor = cosine_factor if self.lr_scheduler == "cosine" else onecycle_factor
        if self.lr_restart_epoch is None or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, total=total))
        epochs = self.trainer.max_epochs or 0
        if self.lr_restart_epoch >= epochs:
            raise ValueError(
                f"`lr_restart_epoch={self.lr_restart_epoch}` must be below `max_epochs` of the trainer, {epochs}."
            )
        restart = round(total * self.lr_restart_epoch / epochs)
        restarted = partial(restarted_factor, factor=factor, restart=restart, total=total)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, restarted)

    def _evaluate(self, batch: Batch, stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        self._check_labels(labels)
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), prog_bar=True, sync_dist=True)
        self.log(f"{stage}_accuracy", accuracy, prog_bar=True)

    def _check_labels(self, labels: Tensor) -> None:
        """Refuse labels beyond the head, unless the data module has vouched for them: on a GPU this look costs time."""
        if self._labels_are_known or int(labels.max()) < self.num_classes:
            return
        raise ValueError(
            f"`num_classes` is {self.num_classes}, but a batch has the label {int(labels.max())}: labels must be in "
            f"0..{self.num_classes - 1}. Set `num_classes` to the number of classes of the data."
        )

    def export_metadata(self) -> dict[str, Any]:
        """Values that ``pruned.safetensors`` carries, from which the network and its preprocessing can be rebuilt."""
        normalization = self.normalization or {}
        return {
            "backbone": self.backbone,
            "head": self.hparams["head"],
            "num_classes": self.num_classes,
            "pretrained": str(self.hparams["weights"]).lower() != "none",
            "mean": normalization.get("mean"),
            "std": normalization.get("std"),
        }

    def _save_plain_hyperparameters(self) -> None:
        """Keep only values that YAML can hold, resolved, so that a checkpoint loads without code and weight files."""
        self.save_hyperparameters()
        functions = [name for name in ("optimizer", "lr_scheduler") if callable(self.hparams.get(name))]
        if functions:
            self.save_hyperparameters(ignore=functions)
        self.hparams.update(num_classes=self.num_classes, normalization=self.normalization)


def _check_restart(epoch: int | None, lr_scheduler: object) -> None:
    if epoch is None:
        return
    check_whole("lr_restart_epoch", epoch, 1)
    if lr_scheduler not in ("cosine", "onecycle"):
        raise ValueError(f"`lr_restart_epoch={epoch}` goes with `lr_scheduler` 'cosine' or 'onecycle' only.")


def _check(lr_scheduler: object, head_lr: float | None, scale_lr: float | None, label_smoothing: float) -> None:
    if not callable(lr_scheduler) and lr_scheduler not in ("constant", "cosine", "onecycle"):
        raise ValueError(
            f"`lr_scheduler` must be 'constant', 'cosine', 'onecycle' or a scheduler class, got {lr_scheduler!r}."
        )
    for name, rate in (("head_lr", head_lr), ("scale_lr", scale_lr)):
        if rate is not None and not 0.0 < rate < math.inf:
            raise ValueError(f"`{name}` must be above 0 (or None for the optimizer's own), got {rate}.")
    if label_smoothing is None or not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"`label_smoothing` must be in [0, 1), got {label_smoothing}.")
