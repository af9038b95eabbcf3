"""Simulated removal of channels of a network, with compensation (Xie et al. 2021, CaP, arXiv 2108.13728).

CODE (ZhouyangXie/pseudopruner, formulas only): moments of unfolded inputs from one pass; removal simulated by zeros.
RECONSTRUCTED, ours: groups of channels that several layers read (residual sums, concatenations); a bias correction that
goes into the running mean of a batch norm where the convolution before it has no bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from bsdp.channel_group import ChannelGroup
from bsdp.compensation import RIDGE, Reader, Selection, compensate, reconstruction_loss, select_inputs
from bsdp.input_moments import InputMoments, Moments
from bsdp.layers import BasisPair
from bsdp.plain_layers import is_transposed, layer_groups, spatial_dims, weight_of
from bsdp.probing import as_inputs, probe

MAX_COLUMNS = 8192  # inputs of a layer whose moments are taken: half a gigabyte
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CHANNELWISE = (*_BATCH_NORMS, nn.PReLU)


def unfit_groups(network: nn.Module, groups: Mapping[str, ChannelGroup]) -> dict[str, str]:
    """Groups that cannot be compensated, and why."""
    found = {}
    for name, group in groups.items():
        reasons = (_unfit(network.get_submodule(m.layer), m.layer, m.side, m.weighted) for m in group.members)
        reason = next((reason for reason in reasons if reason), None)
        if reason is not None:
            found[name] = reason
    return found


def _unfit(layer: nn.Module, name: str, side: str, weighted: bool) -> str | None:
    if isinstance(layer, BasisPair):
        return f"{name!r} is decomposed: multiply it out first (`bsdp.fold`)"
    if not weighted:
        return None if isinstance(layer, _CHANNELWISE) else f"{name!r} ({type(layer).__name__}) mixes the channels"
    if side != "in":
        return None
    if layer_groups(layer) > 1:
        return f"{name!r}, which reads it, is a grouped convolution"
    if is_transposed(layer):
        return f"{name!r}, which reads it, is a transposed convolution"
    if parametrize.is_parametrized(layer):
        return f"{name!r}, which reads it, is parametrized"
    if weight_of(layer)[0].numel() > MAX_COLUMNS:
        return f"{name!r}, which reads it, has more than {MAX_COLUMNS} inputs"
    return None


def collect_input_moments(
    model: nn.Module, batches: Iterable[Any], layers: Mapping[str, nn.Module], *, max_positions: int | None = None
) -> dict[str, Moments]:
    """Moments of what layers read, over some batches of inputs of a model.

    Args:
        model: The model, which runs in eval mode.
        batches: Inputs of the model: tensors, or tuples of arguments. No labels.
        layers: Layers inside it, by name.
        max_positions: See `InputMoments`.
    """
    moments = InputMoments(layers, max_positions=max_positions)
    with moments.collecting(model):
        for batch in batches:
            model(*as_inputs(batch))
    return moments.compute()


def norms_after(network: nn.Module, example: tuple[Any, ...], layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The batch norm with running statistics that alone takes the output of each layer; layers without one left out."""
    last: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, list[nn.Module]] = {}
    names = {layer: name for name, layer in layers.items()}
    norms = [m for m in network.modules() if isinstance(m, _BATCH_NORMS) and m.running_mean is not None]

    def observe(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if module in names:
            last[id(output)] = (names[module], output)  # the tensor is held, so that no other gets its id
        elif inputs and id(inputs[0]) in last:
            found.setdefault(last[id(inputs[0])][0], []).append(module)

    with probe(network, [*layers.values(), *norms], observe):
        network(*example)
    calls = [norm for taken in found.values() for norm in taken]
    single = {name: taken[0] for name, taken in found.items() if len(taken) == 1 and calls.count(taken[0]) == 1}
    if _absorb(network, example, layers, single):
        return single
    return {name: norm for name, norm in single.items() if _absorb(network, example, layers, {name: norm})}


def _absorb(
    network: nn.Module, example: tuple[Any, ...], layers: Mapping[str, nn.Module], norms: Mapping[str, nn.Module]
) -> bool:
    """Whether nothing changes when layers put out more and the running means are as much higher: nobody else reads."""
    means = {name: norm.running_mean for name, norm in norms.items()}
    handles = []
    with probe(network, (), lambda *_: None):
        expected = network(*example)
        try:
            for name, norm in norms.items():
                shift = torch.linspace(0.5, 1.5, len(means[name])).to(means[name])  # type: ignore[arg-type]
                norm.running_mean = means[name] + shift  # type: ignore[operator]
                handles.append(layers[name].register_forward_hook(partial(_add, shift)))
            outputs = network(*example)
        except RuntimeError:  # sizes that do not fit: the channels are not those of the layer
            return False
        finally:
            for handle in handles:
                handle.remove()
            for name, norm in norms.items():
                norm.running_mean = means[name]
    leaves = zip(tree_leaves(expected), tree_leaves(outputs), strict=True)
    return all(torch.allclose(one, other, rtol=1e-3, atol=1e-4) for one, other in leaves if isinstance(one, Tensor))


def _add(shift: Tensor, layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output + shift.view(-1, *[1] * spatial_dims(layer))


@dataclass(frozen=True)
class _Layer:
    """A layer that reads channels, as it was."""

    layer: nn.Module
    weight: Tensor  # [outputs, m], as found
    bias: Tensor | None
    norm: nn.Module | None  # takes the bias correction of a layer without a bias
    norm_mean: Tensor | None
    moments: Moments
    kernel: int

    @property
    def biased(self) -> bool:
        """Whether the mean of the outputs can be corrected."""
        return self.bias is not None or self.norm is not None

    def columns(self, channels: Tensor) -> Tensor:
        """Columns of channels, ``[units, channels per unit]`` to ``[units, columns per unit]``."""
        steps = torch.arange(self.kernel)
        return (channels.cpu()[..., None] * self.kernel + steps).flatten(-2).to(self.weight.device)


class Compensation:
    """Simulates the removal of channels in a network: columns become zero, and the others make up for them.

    Args:
        network: A plain network; its weights change with `apply`.
        groups: Its groups, see `channel_groups`.
        example: Example inputs.
        moments: Of the readers' inputs; groups with a reader that has none are left out.
        restore_variance: See `compensate`; for layers followed by a batch norm.
        ridge: See `compensate`.

    Attributes:
        groups: Those that can be pruned.
        skipped: Those that cannot, and why.
        removed: Units removed now, per group; groups that lose nothing may be missing.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: Mapping[str, ChannelGroup],
        example: tuple[Any, ...],
        moments: Mapping[str, Moments],
        *,
        restore_variance: bool = True,
        ridge: float = RIDGE,
    ) -> None:
        self.restore_variance, self.ridge = restore_variance, ridge
        self.skipped = unfit_groups(network, groups)
        for name, group in groups.items():
            unseen = [member.layer for member in group.sides("in") if member.layer not in moments]
            if unseen and name not in self.skipped:
                self.skipped[name] = f"{unseen[0]!r}, which reads it, was never called"
        self.groups = {name: group for name, group in groups.items() if name not in self.skipped}
        self.removed: dict[str, int] = {}
        self._orders: dict[str, Selection] = {}
        names = dict.fromkeys(member.layer for group in self.groups.values() for member in group.sides("in"))
        layers = {name: network.get_submodule(name) for name in names}
        norms = norms_after(network, example, layers)
        self._layers = {name: _as_found(layer, norms.get(name), moments[name]) for name, layer in layers.items()}

    def selection(self, group: str) -> Selection:
        """Units of a group in the order in which they stay, given what was removed elsewhere when first asked."""
        if group not in self._orders:
            readers = []
            for member in self.groups[group].sides("in"):
                layer = self._layers[member.layer]
                columns = layer.columns(member.index)
                kept = self._keep(member.layer, without=group)
                kept[columns.flatten()] = False
                covariance = layer.moments.covariance if layer.biased else layer.moments.second
                weight = layer.weight.double()
                readers.append(Reader(weight, covariance, columns, kept.nonzero().flatten()))
            self._orders[group] = select_inputs(readers, ridge=self.ridge)
        return self._orders[group]

    def units(self, group: str) -> Tensor:
        """Units of a group that are removed now, ascending."""
        count = self.removed.get(group, 0)
        return self.selection(group).order[-count:].sort().values if count else torch.arange(0)

    @torch.no_grad()
    def apply(self, removed: Mapping[str, int]) -> None:
        """Remove so many units per group, in place of what was removed before."""
        changed = [g for g in self.groups if removed.get(g, 0) != self.removed.get(g, 0)]
        for name in changed:
            if removed.get(name, 0):
                self.selection(name)
        self.removed = {name: count for name, count in removed.items() if count}
        for name in dict.fromkeys(member.layer for g in changed for member in self.groups[g].sides("in")):
            self._write(name)

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Give the network its own weights back if the ``with`` block fails."""
        try:
            yield
        except BaseException:
            self.apply({})
            raise

    def losses(self) -> dict[str, float]:
        """Share of each reader's output variance that it does not reproduce now; on the data of the moments."""
        found = {}
        for name, layer in self._layers.items():
            keep = self._keep(name)
            own = reconstruction_loss(
                layer.weight, layer.weight[:, :0], layer.moments, keep & False, biased=layer.biased
            )
            new = weight_of(layer.layer).detach().flatten(1)[:, keep]
            lost = reconstruction_loss(layer.weight, new, layer.moments, keep, biased=layer.biased)
            found[name] = lost / own if own > 0 else 0.0
        return found

    def _keep(self, name: str, *, without: str | None = None) -> Tensor:
        """Which inputs of a reader stay, booleans ``[m]``."""
        layer = self._layers[name]
        keep = torch.ones(layer.weight.shape[1], dtype=torch.bool, device=layer.weight.device)
        for group, count in self.removed.items():
            if count and group != without:
                for member in self.groups[group].sides("in"):
                    if member.layer == name:
                        keep[layer.columns(member.index[self.units(group)]).flatten()] = False
        return keep

    def _write(self, name: str) -> None:
        found, keep = self._layers[name], self._keep(name)
        weight, bias, mean = found.weight, found.bias, found.norm_mean
        if not bool(keep.all()):
            zeros = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
            start = (zeros if found.norm is not None else None) if bias is None else bias
            restore = self.restore_variance and found.norm is not None
            new, shift = compensate(weight, start, found.moments, keep, ridge=self.ridge, restore_variance=restore)
            weight = torch.zeros_like(weight, dtype=torch.float64)
            weight[:, keep] = new
            if bias is not None:
                bias = shift
            elif mean is not None and shift is not None:
                mean = mean.double() - shift
        own = weight_of(found.layer)
        own.copy_(weight.view(own.shape))
        if bias is not None:
            found.layer.bias.copy_(bias)  # type: ignore[operator]
        if mean is not None and found.norm is not None:
            found.norm.running_mean.copy_(mean)  # type: ignore[operator]


def _as_found(layer: nn.Module, norm: nn.Module | None, moments: Moments) -> _Layer:
    weight, bias = weight_of(layer).detach(), layer._parameters.get("bias")
    mean = None if norm is None else norm.running_mean
    return _Layer(
        layer=layer,
        weight=weight.flatten(1).clone(),
        bias=None if bias is None else bias.detach().clone(),
        norm=norm,
        norm_mean=mean.clone() if isinstance(mean, Tensor) else None,
        moments=moments,
        kernel=weight[0, 0].numel(),
    )
