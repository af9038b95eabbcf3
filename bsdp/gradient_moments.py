"""Second moments of the loss gradient at the layers' outputs: what an output error costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bsdp.calibration import OutputMoments, moment_layers
from bsdp.compiling import uncompiled
from bsdp.moments import LayerMoment, LayerMoments, as_columns
from bsdp.probing import as_inputs, evaluating

Loss = Callable[[Any, Any], Tensor]


class GradientMoments(LayerMoments):
    """Running second moments of ``dL/dy``, y being the outputs of pairs or plain layers by name.

    Gradients of parameters are neither computed nor touched.
    """

    @contextmanager
    def collecting(self, model: nn.Module) -> Iterator[Callable[[Tensor], None]]:
        """Watch a model in eval mode; call what this yields with each loss, whose value does not matter.

        The loss should be a sum over examples, so that batches of any size count alike.
        """
        outputs: list[tuple[nn.Module, Tensor]] = []

        def note(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            outputs.append((module, output))
            return output.clone()  # what follows may work in place

        def take(loss: Tensor) -> None:
            noted = list(outputs)
            gradients = torch.autograd.grad(loss, [output for _, output in noted], allow_unused=True)
            for (module, _), gradient in zip(noted, gradients, strict=True):
                if gradient is not None:
                    self.add(module, as_columns(module, gradient))
            outputs.clear()  # those of layers that the backward pass computed once more, too

        handles = [layer.register_forward_hook(note) for layer in self.layers.values()]
        try:
            with evaluating(model), torch.enable_grad(), uncompiled():
                yield take
        finally:
            for handle in handles:
                handle.remove()


class MetricCollector:
    """Collects, in one pass, all that a metric needs.

    Args:
        layers: Pairs or plain layers, by name.
        metric: ``"activation"`` or ``"kfac"``.
        loss: See `collect_gradient_moments`.
        generator: See there.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        metric: str,
        *,
        loss: Loss | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.outputs = OutputMoments(layers)
        self.gradients = GradientMoments(layers) if metric == "kfac" else None
        self.loss = loss
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator

    @contextmanager
    def collecting(self, model: nn.Module) -> Iterator[Callable[[Any, Any], None]]:
        """Watch a model in eval mode; call what this yields with the outputs of each batch, and labels or None."""
        with ExitStack() as stack:
            stack.enter_context(self.outputs.collecting(model))
            take = None if self.gradients is None else stack.enter_context(self.gradients.collecting(model))
            yield lambda outputs, labels: None if take is None else take(self._loss_of(outputs, labels))

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Average over processes."""
        self.outputs.reduce(reduce)
        if self.gradients is not None:
            self.gradients.reduce(reduce)

    def compute(self) -> tuple[dict[str, LayerMoment], dict[str, LayerMoment]]:
        """Output moments and gradient moments by name; the latter are empty where the metric needs none."""
        return self.outputs.compute(), {} if self.gradients is None else self.gradients.compute()

    def _loss_of(self, outputs: Any, labels: Any) -> Tensor:
        return loss_of(outputs, labels, self.loss, self.generator)


def collect_gradient_moments(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, LayerMoment]:
    """Second moments of the loss gradient at the output of every pair and plain layer of a model.

    For ``metric="kfac"`` of `decompose` and `rebase`. The model's head must have been trained, or they mean nothing.

    Args:
        model: The model, decomposed or not. With the default loss its output are logits, ``[batch, classes, ...]``.
        batches: Pairs of inputs (a tensor, or a tuple of arguments) and labels; or tensors, inputs without labels.
        loss: Takes outputs and labels to a scalar. Default: cross entropy, summed over the examples.
        generator: Without labels and `loss`, labels are drawn with it from the distribution that the model itself
            predicts, which gives the true Fisher information instead of the empirical one. Default: a new one of
            seed 0.

    Returns:
        The moments by layer name; layers that the loss does not depend on are left out.

    Raises:
        ValueError: If there is no batch, a batch is of another form, or a `loss` has no labels.
    """
    moments = GradientMoments(moment_layers(model))
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    batch = None
    with moments.collecting(model) as take:
        for batch in batches:
            inputs, labels = inputs_and_labels(batch)
            take(loss_of(model(*as_inputs(inputs)), labels, loss, generator))
    if batch is None:
        raise ValueError("`batches` is empty: gradient moments need at least one batch of calibration data.")
    return moments.compute()


def inputs_and_labels(batch: Any) -> tuple[Any, Any]:
    """Split a batch into inputs, and labels or None.

    Raises:
        ValueError: If it is neither a tensor nor a pair.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        return batch[0], batch[1] if len(batch) == 2 else None
    raise ValueError(
        f"`batches` must hold pairs of inputs and labels, or tensors; one is a {type(batch).__name__}"
        + (f" of {len(batch)}." if isinstance(batch, (tuple, list)) else ".")
    )


def loss_of(outputs: Any, labels: Any, loss: Loss | None, generator: torch.Generator) -> Tensor:
    """The loss of a batch, with labels that are drawn where there are none; see `collect_gradient_moments`."""
    if labels is None and loss is not None:
        raise ValueError(
            "`loss` needs labels: make `batches` pairs of inputs and labels, or leave `loss` out to have labels drawn "
            "from the model's own predictions."
        )
    if loss is not None:
        return loss(outputs, labels)
    return summed_cross_entropy(outputs, drawn_labels(outputs, generator) if labels is None else labels)


def summed_cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """Cross entropy of logits, in float32 at least, summed over the batch."""
    check_logits(outputs)
    logits = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return F.cross_entropy(logits, labels.to(logits.device), reduction="sum")


def drawn_labels(outputs: Any, generator: torch.Generator) -> Tensor:
    """Draw labels from the distribution that logits stand for.

    Args:
        outputs: Logits, ``[batch, classes, ...]``.
        generator: On the CPU.

    Returns:
        ``[batch, ...]``.
    """
    check_logits(outputs)
    shares = outputs.detach().double().cpu().movedim(1, -1).softmax(-1)
    return torch.multinomial(shares.flatten(0, -2), 1, generator=generator).view(shares.shape[:-1])


def check_logits(outputs: Any) -> None:
    """Refuse what is no tensor of logits, ``[batch, classes, ...]``, of two classes or more."""
    if not isinstance(outputs, Tensor) or outputs.dim() < 2 or outputs.shape[1] < 2:
        what = f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"the KFAC metric needs logits [batch, classes, ...] of two classes or more, the model gave {what}: use "
            "the activation metric, or call `collect_gradient_moments` with a `loss` of your own."
        )
