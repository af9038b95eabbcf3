"""Folding batch norms into the layers before them, where that is exact."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from bsdp._compare import Difference, largest_difference, tolerance_for
from bsdp.folding import refuse_pairs
from bsdp.probing import as_inputs, evaluating
from bsdp.surgery import module_names, replace_modules
from bsdp.widths import note_new_bias

_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_LAYERS = (_ConvNd, nn.Linear)
_CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.conv_transpose", "aten.linear.")


@dataclass(frozen=True)
class BatchNormFolding:
    """What `fold_batch_norm` did.

    Attributes:
        model: The copy with fewer batch norms, in eval mode.
        folded: ``{batch norm: layer that took it up}`` by dotted names.
        kept: ``{batch norm: reason}`` for those that are still there.
        difference: Between the outputs of the model and of the copy on the example input.
    """

    model: nn.Module
    folded: dict[str, str]
    kept: dict[str, str]
    difference: Difference

    def __str__(self) -> str:
        lines = [
            f"{len(self.folded)} batch norms folded (largest difference of the outputs: {self.difference}), "
            f"{len(self.kept)} kept"
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"  kept: {shown}: {reason}")
        return "\n".join(lines)


def fold_batch_norm(model: nn.Module, example_input: Tensor | tuple[Tensor, ...]) -> BatchNormFolding:
    """Copy a plain model with its batch norms folded into the convolution or linear layer before them.

    A batch norm in eval mode is a scale and a shift per channel. It is folded only where that is exact, which is read
    off a graph of the model (``torch.export``): its one input is the output of one layer, nothing else reads that
    output, and neither the layer's weight nor the batch norm is used a second time. The new weights are computed in
    float64 and rounded once. A model that cannot be traced is copied without any folding.

    Args:
        model: A model of plain layers, see `fold`; it is left alone. It counts as being in eval mode.
        example_input: Input (or tuple of inputs) of the model. Branches that it does not take are not seen.

    Returns:
        The copy, in eval mode, and what became of each batch norm.

    Raises:
        ValueError: If the model still has pairs.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
        >>> folding = bsdp.fold_batch_norm(model, torch.zeros(1, 3, 8, 8))
        >>> print(folding)
        1 batch norms folded (largest difference of the outputs: 0.0e+00), 1 kept
          kept: 3: its input is not the output of a convolution or linear layer
    """
    refuse_pairs(model)
    inputs = as_inputs(example_input)
    norms = {module: names[0] for module, names in module_names(model).items() if isinstance(module, _BatchNorm)}
    plain = copy.deepcopy(model).eval()
    unchanged = Difference(0.0, 0.0)
    if not norms:
        return BatchNormFolding(plain, {}, {}, unchanged)
    try:
        with evaluating(plain):
            program = torch.export.export(plain, inputs)
    except Exception as error:  # tracing fails in many ways, all of which mean that the graph is not known
        reason = f"the model cannot be traced ({type(error).__name__}: {_first_line(error)})"
        return BatchNormFolding(plain, {}, dict.fromkeys(norms.values(), reason), unchanged)
    folded_model = copy.deepcopy(plain)
    folded, kept = _fold_all(folded_model, program)
    try:
        with evaluating(plain), evaluating(folded_model):
            difference = largest_difference(plain(*inputs), folded_model(*inputs))
        reason = f"folding it changes the outputs by {difference}"
    except Exception as error:  # code that reads attributes of a batch norm that is gone
        difference, reason = Difference(float("nan"), float("nan")), f"the model needs it ({_first_line(error)})"
    if not difference.relative <= tolerance_for(folded_model):
        return BatchNormFolding(plain, {}, {**kept, **dict.fromkeys(folded, reason)}, unchanged)
    return BatchNormFolding(folded_model, folded, kept, difference)


def _fold_all(model: nn.Module, program: torch.export.ExportedProgram) -> tuple[dict[str, str], dict[str, str]]:
    graph = _Graph(model, program)
    names = {module: found[0] for module, found in module_names(model).items()}
    folded: dict[str, str] = {}
    kept: dict[str, str] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for norm in [module for module in names if isinstance(module, _BatchNorm)]:
        try:
            layer, remains = graph.layer_before(norm), _without_norm(norm)
        except _KeepError as reason:
            kept[names[norm]] = str(reason)
            continue
        weight, bias = _folded_parameters(layer, norm)
        layer.weight, layer.bias = weight, bias
        note_new_bias(layer)
        replacements[norm] = remains
        folded[names[norm]] = names[layer]
    replace_modules(model, replacements)
    model.eval()
    return folded, kept


class _KeepError(Exception):
    """Why a batch norm must stay."""


class _Graph:
    """The graph of a model, read for what is called with which parameters."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram) -> None:
        tensors = dict(_named_tensors(model))
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in module_names(model):
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    owners.setdefault(id(tensor), []).append((module, key))
        signature = program.graph_signature
        targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._owners = owners
        self._tensors = {node: tensors[targets[node.name]] for node in program.graph.nodes if node.name in targets}
        self._uses = Counter[int]()
        for node, tensor in self._tensors.items():
            self._uses[id(tensor)] += len(node.users)
        self._norm_calls = [node for node in program.graph.nodes if str(node.target) == "aten.batch_norm.default"]

    def layer_before(self, norm: _BatchNorm) -> nn.Module:
        """The layer whose output goes into the batch norm and nowhere else."""
        if norm.running_mean is None:
            raise _KeepError("it normalises by the statistics of each batch")
        calls = [call for call in self._norm_calls if self._owner(call.args[3]) is norm]
        own = [tensor for tensor in (*norm.parameters(), norm.running_mean, norm.running_var) if tensor is not None]
        if len(calls) != 1 or any(self._uses[id(tensor)] != 1 for tensor in own):
            raise _KeepError("it is not called exactly once")
        call = calls[0]
        if call.args[5] or call.args[7] != norm.eps:
            raise _KeepError("it does not normalise by its running statistics")
        source = call.args[0]
        if not isinstance(source, fx.Node) or not str(source.target).startswith(_CONVOLUTIONS):
            raise _KeepError("its input is not the output of a convolution or linear layer")
        if len(source.users) != 1:
            raise _KeepError("the output of the layer before it is used elsewhere, too")
        if str(source.target).startswith("aten.linear") and source.meta["val"].dim() != 2:
            raise _KeepError("its channels are not the features of the linear layer before it")
        return self._layer_of(source)

    def _layer_of(self, call: fx.Node) -> nn.Module:
        """The module whose weight and bias a convolution is called with, if it has them for itself."""
        weight = call.args[1]
        bias = call.args[2] if len(call.args) > 2 else None
        layer = self._owner(weight)
        if not isinstance(layer, _LAYERS) or self._tensor(weight) is not layer.weight:
            raise _KeepError("the weight of the layer before it is computed, shared or not in a known layer")
        own = [tensor for tensor in (layer.weight, layer.bias) if tensor is not None]
        if self._tensor(bias) is not layer.bias or any(self._uses[id(tensor)] != 1 for tensor in own):
            raise _KeepError("the layer before it, or its weight or bias, is used a second time")
        return layer

    def _tensor(self, argument: object) -> Tensor | None:
        return self._tensors.get(argument) if isinstance(argument, fx.Node) else None

    def _owner(self, argument: object) -> nn.Module | None:
        """The only module that holds a tensor."""
        tensor = self._tensor(argument)
        owners = self._owners.get(id(tensor), []) if tensor is not None else []
        return owners[0][0] if len(owners) == 1 else None


def _named_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _without_norm(norm: _BatchNorm) -> nn.Module:
    """What is left of a batch norm after folding."""
    if type(norm) in _PLAIN_NORMS:
        return nn.Identity()
    parts: list[Any] = [getattr(norm, name, None) for name in ("drop", "act")]
    if type(norm).__name__ == "BatchNormAct2d" and all(isinstance(part, nn.Module) for part in parts):
        return nn.Sequential(*(part for part in parts if not isinstance(part, nn.Identity)))  # timm's norm + activation
    raise _KeepError(f"it is a {type(norm).__name__}, of which more may be needed than the normalisation")


@torch.no_grad()
def _folded_parameters(layer: nn.Module, norm: _BatchNorm) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of a layer followed by a batch norm, computed in float64 and rounded once."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and norm.running_mean is not None and norm.running_var is not None
    ones = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight
    zeros = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    old_bias = torch.zeros_like(norm.running_mean) if not isinstance(bias, Tensor) else bias
    per_channel = [t.double() for t in (old_bias, norm.running_mean, norm.running_var, ones, zeros)]
    if isinstance(layer, _ConvTransposeNd):
        # The output channels of a group are the second axis of its own rows, so every group is folded by itself.
        chunks = zip(weight.double().chunk(layer.groups), *(t.chunk(layer.groups) for t in per_channel), strict=True)
        parts = [fuse_conv_bn_weights(w, b, m, v, norm.eps, g, c, transpose=True) for w, b, m, v, g, c in chunks]
        new_weight, new_bias = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    else:
        fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        b, m, v, g, c = per_channel
        new_weight, new_bias = fuse(weight.double(), b, m, v, norm.eps, g, c)
    return (
        nn.Parameter(new_weight.to(weight), weight.requires_grad),
        nn.Parameter(new_bias.to(weight), weight.requires_grad),
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:160]
