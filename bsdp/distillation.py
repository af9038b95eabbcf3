"""Distillation: a pruned network learns the class probabilities of the unpruned one beside the labels.

After Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network* (arXiv 1503.02531): with the temperature
T, the loss ``(1 - w) * loss + w * T^2 * KL(softmax(teacher / T) || softmax(student / T))``. The second term enters as a
gradient on the network's outputs, so that no training loop has to know of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bsdp._checks import check_above, check_fraction
from bsdp.compiling import inside_compiled, uncompiled
from bsdp.record import PruningRecord
from bsdp.snapshots import load_values
from bsdp.structure import set_shape

See = Callable[[tuple[Any, ...], dict[str, Any], Tensor], None]


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, the mean over the batch, in float32 at least.

    Args:
        student: Class scores that learn, ``[batch, classes]``.
        teacher: Class scores to learn from, of the same shape.
        temperature: T; the factor T^2 keeps the size of the gradient about the same for all T.
    """
    new, old = (F.log_softmax(_wide(scores) / temperature, dim=1) for scores in (student, teacher))
    return temperature**2 * F.kl_div(new, old, log_target=True, reduction="batchmean")


@torch.no_grad()
def distillation_gradient(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """Gradient of `distillation_loss` to `student`: ``T (softmax(student / T) - softmax(teacher / T)) / batch``."""
    new, old = (F.softmax(_wide(scores) / temperature, dim=1) for scores in (student, teacher))
    return temperature / len(student) * (new - old)


def _wide(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


class Distiller:
    """Adds the gradient of distillation to whatever loss a network trains with.

    What the loss says about the outputs counts ``1 - weight``, the teacher ``weight``; parts of the loss that do not
    reach the outputs (penalties on weights) stay as they are. Every batch costs one more forward pass, without
    gradients, and the teacher stays in memory.

    Args:
        teacher: The network to learn from; it is put into eval mode and frozen.
        weight: Weight of the teacher, in [0, 1].
        temperature: See `distillation_loss`.

    Example:
        >>> import copy
        >>> model = nn.Linear(8, 3)
        >>> distiller = bsdp.Distiller(copy.deepcopy(model), weight=0.5, temperature=2.0)
        >>> with distiller.attached(model):
        ...     loss = nn.functional.cross_entropy(model(torch.ones(4, 8)), torch.tensor([0, 1, 2, 0]))
        ...     loss.backward()  # the gradient of 0.5 * loss + 0.5 * distillation_loss
    """

    def __init__(self, teacher: nn.Module, *, weight: float = 0.5, temperature: float = 2.0) -> None:
        check_fraction("weight", weight)
        check_above("temperature", temperature, 0)
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight, self.temperature = weight, temperature

    @contextmanager
    def attached(self, student: nn.Module, *, scale: float = 1.0, name: str = "the network") -> Iterator[None]:
        """Let the forward passes that train inside the ``with`` block learn from the teacher.

        The backward pass may come later. Compiled graphs are used only if `student` is what ``torch.compile(module)``
        returns; any others run without compilation inside the block.

        Args:
            student: The network; it gets the same inputs as the teacher and returns class scores ``[batch, classes]``.
            scale: What the loss is multiplied with before its backward pass: the scale of mixed precision, 1 / steps
                of accumulation.
            name: What errors call the network.
        """

        def see(arguments: tuple[Any, ...], named: dict[str, Any], scores: Tensor) -> None:
            with torch.no_grad():
                target = self.teacher(*arguments, **named)
            # At once, as the scores may be changed in place before the backward pass.
            term = self.weight * scale * distillation_gradient(scores, target, self.temperature)

            def mix(gradient: Tensor) -> Tensor:
                return (1.0 - self.weight) * gradient + term.to(gradient.dtype)

            scores.register_hook(mix)  # type: ignore[no-untyped-call]

        with seeing_scores(student, see, name=name):
            yield


@contextmanager
def seeing_scores(network: nn.Module, see: See, *, name: str = "the network") -> Iterator[None]:
    """Call ``see(arguments, named_arguments, scores)`` for every forward pass that trains inside the ``with`` block.

    Args:
        network: A module that returns class scores.
        see: What to call.
        name: What errors call the network.

    Raises:
        ValueError: From the forward pass, if it returns anything but a tensor ``[batch, classes]``.
    """
    count, begun = [0], list[int]()

    def before(_module: nn.Module, _arguments: Any) -> None:
        begun.append(count[0])

    def after(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if count[0] > begun.pop():  # DDP calls a LightningModule for a whole training step, which calls it again
            return
        if not torch.is_grad_enabled() or (isinstance(output, Tensor) and not output.requires_grad):
            return
        _check_scores(output, name)
        count[0] += 1
        see(arguments, named, output)

    with ExitStack() as stack:
        for handle in (
            network.register_forward_pre_hook(before),
            network.register_forward_hook(after, with_kwargs=True),
        ):
            stack.callback(handle.remove)
        if not inside_compiled(network):  # whose own hooks run outside of the graphs
            stack.enter_context(uncompiled())
        yield


def _check_scores(output: Any, name: str) -> None:
    if isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1 and output.is_floating_point():
        return
    what = f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise ValueError(
        f"`distillation` compares class scores, a tensor [batch, classes] with at least 2 classes, but {name} returned "
        f"{what}. Name the module that returns them in `distillation_module`, or set `distillation` to 0."
    )


def copy_of_then(model: nn.Module, name: str, state: Mapping[str, Tensor], shape: Mapping[str, Any]) -> nn.Module:
    """A frozen copy of a part of a model in eval mode, with the structure and the weights the model had then.

    Args:
        model: The model as it is now.
        name: Dotted name of the part; "" for all.
        state: The values of the model then, see `bsdp.snapshots.copy_values`.
        shape: Its shape then, see `bsdp.structure.shape_of`.
    """
    part = model.get_submodule(name) if name else model
    with uncompiled(part):
        made = copy.deepcopy(part)
    prefix = f"{name}." if name else ""
    inside = {
        table: {key.removeprefix(name).removeprefix("."): value for key, value in entries.items() if _is_in(key, name)}
        for table, entries in shape.items()
    }
    set_shape(made, inside)
    load_values(made, {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    for parameter in made.parameters():
        parameter.grad = None
    return made.eval().requires_grad_(False)


def _is_in(key: str, name: str) -> bool:
    return not name or key == name or key.startswith(f"{name}.")


class SelfDistillation:
    """Lets a model that is pruned in rounds learn from itself as it was at the reference, before the first cut.

    Args:
        model: The model that is pruned.
        record: What happened to it; the teacher's state is in there, so a resumed run has the same teacher.
        name: Dotted name of the module in the model that returns class scores ``[batch, classes]``; "" for the model.
        weight: See `Distiller`.
        temperature: See `Distiller`.

    Attributes:
        seen: Forward passes that trained inside `attached`.

    Raises:
        ValueError: If the model has no module of that name.
    """

    def __init__(
        self, model: nn.Module, record: PruningRecord, name: str, *, weight: float, temperature: float
    ) -> None:
        outer = name.removesuffix("_orig_mod").removesuffix(".")
        modules = dict(model.named_modules(remove_duplicate=False))
        if outer not in modules:
            children = [child for child, _ in model.named_children()]
            raise ValueError(
                f"`distillation_module` must be the dotted name of a module that returns class scores, got {name!r}, "
                f"which the model does not have; its children are {', '.join(map(repr, children))}."
            )
        self.model, self.record = model, record
        self.student = modules[outer]
        self.name = ".".join(part for part in (outer, inside_compiled(self.student)) if part)
        self.weight, self.temperature = weight, temperature
        self.seen = 0
        self._distiller: Distiller | None = None

    @property
    def shown(self) -> str:
        """What errors call the module."""
        return repr(self.name) if self.name else f"the {type(self.model).__name__} itself"

    @property
    def started(self) -> bool:
        """Whether something was cut."""
        return len(self.record.rounds) > 1

    def teacher(self) -> nn.Module:
        """A frozen copy of the network as it was at the reference, in eval mode.

        Raises:
            ValueError: If there was no validation and no cut yet, or the run had ended before it was resumed.
        """
        if self.record.reference_state is None:
            raise ValueError(
                "there is no unpruned model to learn from: the warm-up has not ended, or the checkpoint is of a run "
                "that had finished without `distillation`. Set `distillation` to 0, or start anew."
            )
        return copy_of_then(self.model, self.name, self.record.reference_state, self.record.reference_shape)

    @contextmanager
    def attached(self, scale: float = 1.0) -> Iterator[None]:
        """Let forward passes inside the ``with`` block learn from the teacher; before the first cut only count them.

        Args:
            scale: See `Distiller.attached`.
        """
        with ExitStack() as stack:
            if self.started:
                if self._distiller is None:
                    self._distiller = Distiller(self.teacher(), weight=self.weight, temperature=self.temperature)
                stack.enter_context(self._distiller.attached(self.student, scale=scale, name=self.shown))
            stack.enter_context(seeing_scores(self.student, self._count, name=self.shown))
            yield

    def forget(self) -> None:
        """Let the teacher go."""
        self._distiller = None

    def _count(self, _arguments: Any, _named: Any, _scores: Any) -> None:
        self.seen += 1
