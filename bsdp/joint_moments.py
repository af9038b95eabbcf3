"""How the outputs of layers in a shortened network go with those of the original, on the same data.

Layout: outputs are brought to columns ``[positions, channels]``. Sums are float64 and of the size of a layer's outputs
squared: memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bsdp.compiling import uncompiled
from bsdp.factorize import to_float64
from bsdp.layers import BasisPair
from bsdp.plain_layers import layer_groups, spatial_dims
from bsdp.probing import as_inputs, evaluating


@dataclass(frozen=True)
class JointMoments:
    """How the outputs of a layer in a shortened network go with the outputs that are wanted.

    Attributes:
        target_mean: ``E[y]``, ``[out]``, all in float64.
        mean: ``E[z]``, ``[out]``.
        cross: ``Cov(y, z)`` per group, ``[groups, out_per_group, out_per_group]``.
        covariance: ``Cov(z)`` per group, same shape.
        count: Positions seen.
    """

    target_mean: Tensor
    mean: Tensor
    cross: Tensor
    covariance: Tensor
    count: int

    @property
    def about_zero(self) -> JointMoments:
        """Second moments in place of covariances, and means of 0: for layers that shall get no bias."""
        groups = len(self.cross)
        y, z = (mean.view(groups, -1, 1) for mean in (self.target_mean, self.mean))
        cross, covariance = self.cross + y @ z.mT, self.covariance + z @ z.mT
        return JointMoments(0.0 * self.target_mean, 0.0 * self.mean, cross, covariance, self.count)


class _Sums:
    """Running sums of one layer."""

    def __init__(self, groups: int) -> None:
        self.groups, self.count = groups, 0
        self.parts: list[Tensor] = []

    def update(self, target: Tensor, output: Tensor) -> None:
        """Add columns ``[positions, out]`` of both."""
        y, z = (t.view(len(t), self.groups, -1).permute(1, 2, 0) for t in (target, output))
        new = [to_float64(t) for t in (target.sum(0), output.sum(0), y @ z.mT, z @ z.mT)]
        self.parts = [a + b for a, b in zip(self.parts, new, strict=True)] if self.parts else new
        self.count += len(output)

    def compute(self) -> JointMoments:
        y, z, cross, second = (part / self.count for part in self.parts)
        columns, rows = (t.view(self.groups, -1, 1) for t in (y, z))
        return JointMoments(y, z, cross - columns @ rows.mT, second - rows @ rows.mT, self.count)


@dataclass(frozen=True)
class Survey:
    """What a first look at a network's layers tells.

    Attributes:
        moments: Per layer in the order of the first calls, with the outputs themselves as targets.
        calls: How often one forward pass calls each layer.
    """

    moments: dict[str, JointMoments]
    calls: dict[str, int]


def survey_outputs(model: nn.Module, names: Iterable[str], batches: Iterable[Any]) -> Survey:
    """Collect the moments of the outputs of layers or pairs.

    Args:
        model: The network.
        names: Layers; those that are never called are left out of the result.
        batches: Inputs: tensors, or tuples of arguments.
    """
    layers = {name: model.get_submodule(name) for name in names}
    sums: dict[str, _Sums] = {}
    calls: dict[str, int] = {}

    def note(name: str, output: Tensor) -> None:
        columns = _columns(output, layers[name])
        sums.setdefault(name, _Sums(layer_groups(layers[name]))).update(columns, columns)
        calls[name] = calls.get(name, 0) + 1

    passes = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(uncompiled())
        for handle in _watch(model, list(layers), note, None):
            stack.callback(handle.remove)
        for batch in batches:
            model(*as_inputs(batch))
            passes += 1
    moments = {name: found.compute() for name, found in sums.items() if found.count}
    return Survey(moments, {name: calls[name] // passes for name in moments})


class _LastLayerDone(BaseException):
    """Ends a forward pass whose rest nobody needs; no `Exception`, which models may catch."""


def collect_joint_moments(
    original: nn.Module,
    shortened: nn.Module,
    names: Iterable[str],
    batches: Iterable[Any],
    *,
    calls: Mapping[str, int] | None = None,
) -> dict[str, JointMoments]:
    """Run two networks side by side on the same batches and compare what layers of the same names put out.

    Outputs of the named layers are in memory for one batch at a time.

    Args:
        original: Gives the targets.
        shortened: A copy of it with pairs; those in `names` stand there at the rank from which they are to be cut.
        names: Layers.
        batches: Inputs: tensors, or tuples of arguments.
        calls: How often a forward pass calls each layer, where that is known: passes then end with the last call.

    Returns:
        Moments per layer; layers that were not called are left out.
    """
    layers = {name: shortened.get_submodule(name) for name in names}
    targets: dict[str, list[Tensor]] = {name: [] for name in layers}
    sums: dict[str, _Sums] = {}

    def note(name: str, output: Tensor) -> None:
        columns = _columns(output, original.get_submodule(name))
        # A view would change with the output, when an activation in place follows.
        targets[name].append(columns.clone() if columns.data_ptr() == output.data_ptr() else columns)

    def receive(name: str, output: Tensor) -> None:
        if targets[name]:
            found = sums.setdefault(name, _Sums(layer_groups(layers[name])))
            found.update(targets[name].pop(0), _columns(output, layers[name]))

    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for network, use in ((original, note), (shortened, receive)):
            stack.enter_context(evaluating(network))
            for handle in _watch(network, list(layers), use, calls):
                stack.callback(handle.remove)
        for batch in batches:
            for network in (original, shortened):
                with _cut_short():
                    network(*as_inputs(batch))
            for waiting in targets.values():
                waiting.clear()
    return {name: found.compute() for name, found in sums.items() if found.count}


def _columns(output: Tensor, layer: nn.Module) -> Tensor:
    """Outputs of a layer or pair as ``[positions, channels]``, in float32 at least."""
    dims = layer.scaling.dims if isinstance(layer, BasisPair) else spatial_dims(layer)
    if dims:
        batched = output if output.dim() == dims + 2 else output.unsqueeze(0)
        output = batched.movedim(1, -1)
    columns = output.detach().reshape(-1, output.shape[-1])
    return columns.to(torch.promote_types(columns.dtype, torch.float32))


def _watch(
    network: nn.Module, names: list[str], use: Callable[[str, Tensor], None], calls: Mapping[str, int] | None
) -> list[Any]:
    """Hooks that hand on the outputs of the named layers and, where that is known, end the pass after the last."""
    left = dict.fromkeys(names, 0)

    def start(_module: nn.Module, _inputs: Any) -> None:
        left.update({name: 0 if calls is None else calls.get(name, 0) for name in names})

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def observe(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            use(name, output)
            left[name] -= 1
            if calls is not None and not any(left.values()):
                raise _LastLayerDone

        return observe

    handles: list[Any] = [network.register_forward_pre_hook(start)]
    return handles + [network.get_submodule(name).register_forward_hook(hook(name)) for name in names]


@contextmanager
def _cut_short() -> Iterator[None]:
    with suppress(_LastLayerDone):
        yield
