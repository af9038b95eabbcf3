"""Importance of bases without training: the mean square Taylor term of every single example.

With features ``a`` of an example, ``s dL/ds = sum over positions of a dL/da`` (Molchanov et al., arXiv 1611.06440,
carried over to bases), so one backward pass scores all bases for every example apart; minibatch gradients would average
the terms of examples before they are squared. With labels, L is the cross-entropy. Without, the score is what a change
of the network's own outputs costs: the expected square of ``s dL/ds`` over labels drawn from the own predictions, which
is the diagonal of the Fisher information and twice the second-order Kullback-Leibler divergence. Instead of drawing
labels, OURS draws random signs for a root of that matrix, ``diag(p) - p p^T = R R^T``, which has the same expectation
and less noise where predictions are sure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bsdp.compiling import uncompiled
from bsdp.importance import NoScoresError
from bsdp.layers import BasisPair
from bsdp.probing import as_inputs, evaluating, first_tensor


def output_root_products(outputs: Tensor, signs: Tensor) -> Tensor:
    """``R e`` with ``R R^T = diag(p) - p p^T``, the Fisher information of the class probabilities p.

    Args:
        outputs: Class scores, ``[examples, classes]``.
        signs: Random signs e, same shape.
    """
    probabilities = outputs.softmax(1)
    roots = probabilities.sqrt()
    return roots * signs - probabilities * (roots * signs).sum(1, keepdim=True)


def example_outputs(outputs: Any) -> Tensor | None:
    """The first tensor of a network's outputs, ``[examples, ...]``; a single number per example becomes a column.

    Args:
        outputs: What the network returns, a tensor or a nest; None comes back where it holds no batch of floats.
    """
    if isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.dim() == 1:
        return outputs[:, None]
    return first_tensor(outputs)


def example_scores(
    model: nn.Module,
    pairs: Mapping[str, BasisPair],
    batches: Iterable[tuple[Any, Tensor | None]],
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Mean over examples of ``(s dL/ds)^2`` for every basis.

    Args:
        model: A decomposed model. Outputs of two axes are class scores; without labels, any other ones (the first
            tensor of a nest) are compared by their squared distance.
        pairs: The pairs to score, by name.
        batches: Inputs and labels; labels None for the label-free score.
        seed: Of the random signs.

    Returns:
        ``{layer name: [groups * rank]}`` in float64; zeros for pairs whose features do not reach the output.

    Raises:
        NoScoresError: If there is no batch, or a score is NaN or infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = {name: torch.zeros_like(p.scaling.delta, dtype=torch.float64) for name, p in pairs.items()}
    examples = 0
    with ExitStack() as stack:
        stack.enter_context(_without_parameter_gradients(model))
        features = stack.enter_context(_features(pairs))
        stack.enter_context(evaluating(model))
        stack.enter_context(uncompiled())
        stack.enter_context(torch.enable_grad())
        for inputs, labels in batches:
            features.clear()
            outputs = example_outputs(model(*as_inputs(inputs)))
            if outputs is None or not outputs.requires_grad:
                continue
            examples += len(outputs)
            _add(sums, features, pairs, _loss(outputs, labels, generator))
    if not examples:
        raise NoScoresError("no batch gave outputs that depend on the decomposed layers: check the calibration data.")
    broken = next((name for name, value in sums.items() if not value.isfinite().all()), None)
    if broken is not None:
        raise NoScoresError(f"scores are NaN or infinite (first in layer {broken!r}): check the calibration data.")
    return {name: value / examples for name, value in sums.items()}


def _loss(outputs: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """A number per batch whose gradient, squared and averaged, is the score; examples do not mix."""
    outputs = outputs.float()
    if labels is not None:
        if outputs.dim() != 2 or not 0 <= int(labels.min()) <= int(labels.max()) < outputs.shape[1]:
            raise ValueError(
                f"`data`: labels go from {int(labels.min())} to {int(labels.max())}, but the network puts out "
                f"{list(outputs.shape)}: give labels of its classes, or choose `allocation='kl'`, which needs none."
            )
        return F.cross_entropy(outputs, labels, reduction="sum")
    drawn = torch.randint(0, 2, outputs.shape, generator=generator, dtype=torch.float32) * 2 - 1
    signs = drawn.to(outputs.device)
    if outputs.dim() == 2 and outputs.shape[1] > 1:
        with torch.no_grad():
            signs = output_root_products(outputs, signs)
    return (outputs * signs).sum()


@torch.no_grad()
def _add(
    sums: dict[str, Tensor], features: Mapping[str, list[Tensor]], pairs: Mapping[str, BasisPair], loss: Tensor
) -> None:
    """Add the squared terms of every example; a pair that is called several times sums its calls first."""
    flat = [feature for calls in features.values() for feature in calls]
    with torch.enable_grad():
        gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    for name, calls in features.items():
        terms = [_terms(feature, next(gradients), pairs[name].scaling.dims) for feature in calls]
        # Calls with different batch axes (windows, say) cannot be added example by example.
        alike = len({len(term) for term in terms}) == 1
        for term in [sum(terms[1:], terms[0])] if alike else terms:
            sums[name] += term.square().sum(0).to(sums[name])


def _terms(feature: Tensor, gradient: Tensor | None, dims: int) -> Tensor:
    """``sum over positions of a dL/da``, ``[examples, bases]``."""
    product = (torch.zeros_like(feature) if gradient is None else feature.detach() * gradient).float()
    if dims == 0:
        return product.reshape(len(product), -1, product.shape[-1]).sum(1)
    batched = product if product.dim() == dims + 2 else product.unsqueeze(0)
    return batched.flatten(2).sum(2)


@contextmanager
def _features(pairs: Mapping[str, BasisPair]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the features of every pair, as the network goes on with them, with gradients."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.requires_grad_()
            found.setdefault(name, []).append(output)
            return output

        return keep

    handles = [pair.basis.register_forward_hook(hook(name)) for name, pair in pairs.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Let backward passes go to the features only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
