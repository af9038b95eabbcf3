"""Splitting the layers of a model into pairs of basis and scaling layers by SVD."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import parameter
from torch.nn.utils import parametrize

from bsdp._checks import check_choice, check_patterns, matches
from bsdp.calibration import check_metric
from bsdp.cost import layer_cost
from bsdp.equivalents import idle_parameter, is_plain, plain_equivalent
from bsdp.factorize import METRICS, factorize, to_float64
from bsdp.layers import BasisPair, watching
from bsdp.moments import LayerMoment
from bsdp.plain_layers import SUPPORTED_TYPES, matrix_of, plain_type, weight_of
from bsdp.probing import as_inputs, probe
from bsdp.shrinkage import is_few, metric_moments, warn_of_few
from bsdp.surgery import has_forward_pre_hooks, module_names, move_hooks, replace_modules
from bsdp.widths import move_mark

_READ = "other code reads its weight or bias, or calls it with more than its input"
_KEPT = "the model keeps a reference of its own to it (in a plain list, say), and goes on calling it"
_IGNORED = "the model does not call what replaces it: it looks for a layer of this very type"
_CANDIDATE_TYPES = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)


@dataclass(frozen=True)
class Decomposition:
    """What `decompose` did.

    Attributes:
        replaced: ``{name: (old layer, pair)}``; a layer with two names stands under both.
        skipped: ``{name: reason}`` for every convolution or linear layer that was left alone.
    """

    replaced: dict[str, tuple[nn.Module, BasisPair]]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} layers decomposed, {len(self.skipped)} left as they are"]
        lines += [f"  left: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def find_head(model: nn.Module) -> str | None:
    """Name of the last convolution or linear layer in module order: what `decompose` takes for the head."""
    names = [name for name, module in model.named_modules() if isinstance(module, _CANDIDATE_TYPES)]
    return names[-1] if names else None


def decompose(
    model: nn.Module,
    *,
    metric: str = "euclidean",
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    statistics: Mapping[str, Tensor | LayerMoment] | None = None,
    gradients: Mapping[str, Tensor | LayerMoment] | None = None,
    centred: bool = False,
    shrinkage: float | None = None,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
) -> Decomposition:
    """Replace, in place, every convolution and linear layer that is worth it by an equivalent pair.

    The outputs do not change: at full rank a pair computes the same function as its layer, for every stride, padding,
    padding mode, dilation and number of groups (Wong et al., arXiv 2108.02893). The factors are computed in float64.
    Layers of derived types and parametrized ones (weight standardisation, weight norm) are decomposed when a plain
    layer turns out to compute the same, else left alone.
    Afterwards the basis filters, the 1x1 weights and the bias of each pair are frozen and only ``scaling.delta``
    trains; other parameters are left as they are (see `freeze`).

    Args:
        model: The model to change.
        metric: How bases are chosen: ``"euclidean"`` (SVD of the weight, orthonormal filters), ``"activation"``
            (eigenvectors of the layer's output second moment, needs `statistics`) or ``"kfac"`` (the same, weighted by
            what an output error does to the loss, needs `gradients` as well).
        include: Shell-style patterns of the layers to decompose, matched against a layer's dotted name and the modules
            that hold it. None: all but the head, taken as the last convolution or linear layer in module order.
        exclude: Patterns of layers to leave alone, in the same form.
        statistics: For ``"activation"`` and ``"kfac"``: moments of the outputs before the bias by layer name, from
            `collect_output_moments`; a tensor ``E[y y^T]``, ``[out_channels, out_channels]``, will do.
        gradients: For ``"kfac"``: moments of the loss gradient at the outputs, from `collect_gradient_moments`.
        centred: Order bases by the variance of what they put out instead of its power, see `rebase`.
        shrinkage: How much of white inputs is mixed into the moments, see `rebase`.
        example_input: Input (or tuple of inputs) of the model. When given, layers that are never called through their
            ``forward``, whose weight or bias other code reads, or that the model also holds outside of its modules
            (in a plain list), are left alone, too.

    Returns:
        What was replaced, and what was left alone with the reason.

    Raises:
        ValueError: If an argument is not allowed, a pattern matches nothing, or weights hold NaN or infinity.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
        >>> print(bsdp.decompose(model))
        1 layers decomposed, 1 left as they are
          left: 2: it is the head (the last layer of the model); name it in `include` to decompose it
    """
    check_metric(metric, shrinkage, {"statistics": statistics, "gradients": gradients})
    names = module_names(model)
    layers = {m: n for m, n in names.items() if isinstance(m, _CANDIDATE_TYPES)}
    pairs = {m: n for m, n in names.items() if isinstance(m, BasisPair)}
    inside_pairs = {child for pair in pairs for child in pair.modules()}
    layers = {m: n for m, n in layers.items() if m not in inside_pairs}
    all_names = [name for group in (*layers.values(), *pairs.values()) for name in group]
    included = None if include is None else check_patterns("include", include, all_names)
    excluded = check_patterns("exclude", exclude, all_names)
    whole = _whole_layers(model, list(layers), example_input)
    owners = _parameter_owners(names)
    head = find_head(model)

    skipped: dict[str, str] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    few: list[str] = []
    for layer, layer_names in layers.items():
        reason = _reason_to_skip(layer, layer_names, included, excluded, head, whole, owners)
        plain = reason or _plain_form(layer)
        if isinstance(plain, str):
            skipped.update(dict.fromkeys(layer_names, plain))
            continue
        given = {"statistics": statistics, "gradients": gradients}
        moment, gradient = (_entry(n, values, layer_names, metric) for n, values in given.items())
        few += [layer_names[0]] if is_few(moment, min(matrix_of(plain).shape[1:])) else []
        try:
            replacements[layer] = pair_from_layer(
                plain, metric=metric, moment=moment, gradient=gradient, centred=centred, shrinkage=shrinkage
            )
        except ValueError as error:
            raise ValueError(f"layer {layer_names[0]!r} {tuple(weight_of(layer).shape)}: {error}") from error
    warn_of_few(few)
    skipped.update(_foreign_layers(names))
    replaced = _swap(model, replacements)
    if example_input is not None:
        for name, reason in _put_back_misused(model, replacements, example_input).items():
            skipped[name] = reason
            del replaced[name]
    by_name = {name: (old, new) for name, (old, new) in replaced.items() if isinstance(new, BasisPair)}
    return Decomposition(by_name, skipped)


def _entry(
    argument: str, given: Mapping[str, Tensor | LayerMoment] | None, layer_names: list[str], metric: str
) -> Tensor | LayerMoment | None:
    """The moments of a layer, under any of its names; None if the metric does without."""
    needed = {"euclidean": (), "activation": ("statistics",), "kfac": ("statistics", "gradients")}
    if given is None or argument not in needed[metric]:
        return None
    name = next((n for n in layer_names if n in given), None)
    if name is None:
        raise ValueError(f"`{argument}` lacks layer {layer_names[0]!r}, which `metric={metric!r}` needs.")
    return given[name]


def _plain_form(layer: nn.Module) -> nn.Module | str:
    """The layer of torch's own types that computes the same, or why there is none."""
    if is_plain(layer):
        return layer
    idle = idle_parameter(layer)
    if idle is not None:
        return f"its parameter {idle!r} does nothing yet, like a fresh adapter, and would be lost"
    odd = f"what a {type(layer).__name__} computes is not what a plain layer does, whatever its weights"
    return plain_equivalent(layer) or odd


def _swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> dict[str, tuple[nn.Module, nn.Module]]:
    replaced = replace_modules(model, replacements)
    for old, new in replacements.items():
        move_hooks(old, new)
        move_mark(old, new)
    return replaced


def _put_back_misused(
    model: nn.Module, replacements: Mapping[nn.Module, nn.Module], example_input: Tensor | tuple[Tensor, ...]
) -> dict[str, str]:
    """Undo the replacements that the model does not go along with; all of them when it does not run any more.

    Returns:
        ``{name: reason}`` of the layers that are back.
    """
    back = {new: old for old, new in replacements.items()}
    called: set[nn.Module] = set()
    try:
        with probe(model, [*back, *replacements], lambda layer, _inputs, _output: called.add(layer)), watching(back):
            model(*as_inputs(example_input))
    except Exception:
        _swap(model, back)
        raise
    whole = {new: _READ for new in back if isinstance(new, BasisPair) and new.whole}
    ignored = {new: _IGNORED for new in back if new not in called}
    reasons = whole | ignored | {new: _KEPT for new, old in back.items() if old in called}
    restored = _swap(model, {new: back[new] for new in reasons})
    return {name: reasons[new] for name, (new, _) in restored.items()}


def pair_from_layer(
    layer: nn.Module,
    *,
    metric: str = "euclidean",
    moment: Tensor | LayerMoment | None = None,
    gradient: Tensor | LayerMoment | None = None,
    centred: bool = False,
    shrinkage: float | None = None,
) -> BasisPair:
    """Build the full-rank pair of one layer; the layer itself is not changed.

    Args:
        layer: A convolution, transposed convolution or linear layer of torch's own types.
        metric: See `decompose`.
        moment: See `decompose`, one entry of `statistics`.
        gradient: See `decompose`, one entry of `gradients`.
        centred: See `decompose`.
        shrinkage: See `decompose`.

    Raises:
        ValueError: If the layer is of another type, or its weight or moment cannot be factorised.
    """
    if type(layer) not in SUPPORTED_TYPES:
        allowed = ", ".join(kind.__name__ for kind in SUPPORTED_TYPES)
        raise ValueError(f"`layer` must be one of {allowed}, got {type(layer).__name__}.")
    check_choice("metric", metric, METRICS)
    pair = BasisPair(layer)
    matrix = to_float64(matrix_of(layer).detach())
    ready = metric_moments(matrix, metric, moment, gradient, centred=centred, shrinkage=shrinkage)
    factors = factorize(matrix, metric=metric, moment=ready.moment, gradient=ready.gradient)
    pair.set_factors(factors.basis, factors.coefficients, factors.sigma)
    if isinstance(layer.bias, Tensor):
        with torch.no_grad():
            pair.scaling.bias.copy_(layer.bias)
    return pair.train(layer.training)


def _reason_to_skip(
    layer: nn.Module,
    names: list[str],
    include: list[str] | None,
    exclude: list[str],
    head: str | None,
    whole: Mapping[nn.Module, str],
    owners: Mapping[int, int],
) -> str | None:
    if include is not None and not any(matches(name, include) for name in names):
        return "not named in `include`"
    if any(matches(name, exclude) for name in names):
        return "named in `exclude`"
    if include is None and head in names:
        return "it is the head (the last layer of the model); name it in `include` to decompose it"
    if any(parameter.is_lazy(p) for p in layer.parameters()):
        return "it is lazy: run the model once before decomposing"
    if plain_type(type(layer)) is None:
        return f"layers of type {type(layer).__name__} are not supported"
    weight = layer.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.layout != torch.strided:
        return "its weight is no ordinary floating-point tensor"
    if weight.is_meta:
        return "its weight is on the meta device: load the weights before decomposing"
    if has_forward_pre_hooks(layer):
        return "it has forward pre-hooks, which may change its weight or input (weight norm of the old style does)"
    if any(owners[id(p)] > 1 for p in layer.parameters()):
        return "it shares a parameter with another module"
    if not parametrize.is_parametrized(layer) and not isinstance(weight, nn.Parameter):
        return "its weight is not a parameter of its own"
    if layer in whole:
        return whole[layer]
    cost = layer_cost(layer)
    if cost.full_rank == 1:
        depthwise = cost.groups > 1 and cost.groups == getattr(layer, "in_channels", 0)
        return "it is depthwise: every group already has rank 1" if depthwise else "its rank is already 1"
    if cost.largest_useful_rank < 1:
        return "no rank would make it smaller"
    return None


def _foreign_layers(names: Mapping[nn.Module, list[str]]) -> dict[str, str]:
    """Convolution and linear layers that are no modules of those types any more."""
    reasons: dict[str, str] = {}
    for module, module_names_ in names.items():
        kind = getattr(module, "original_name", type(module).__name__)
        if not kind.startswith(("Conv", "Linear")) or kind.endswith("PackedParams"):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            reason = "it is scripted: decompose the model before `torch.jit.script`"
        elif ".quantized." in type(module).__module__:
            reason = "it is quantised: decompose the model before quantising it"
        else:
            continue
        reasons.update(dict.fromkeys(module_names_, reason))
    return reasons


def _parameter_owners(names: Mapping[nn.Module, list[str]]) -> dict[int, int]:
    owners: dict[int, int] = {}
    for module in names:
        for parameter_ in module._parameters.values():
            if parameter_ is not None:
                owners[id(parameter_)] = owners.get(id(parameter_), 0) + 1
    return owners


def _whole_layers(
    model: nn.Module, layers: list[nn.Module], example_input: Tensor | tuple[Tensor, ...] | None
) -> dict[nn.Module, str]:
    """Layers that other code uses in ways that a folded pair does not offer, and why."""
    reasons: dict[nn.Module, str] = {}
    if example_input is not None:
        called: set[nn.Module] = set()
        with probe(model, layers, lambda layer, _inputs, _output: called.add(layer)), _readers(layers) as read:
            model(*as_inputs(example_input))
        reasons.update({layer: _READ for layer in read})
        reasons.update({layer: "it is never called on the example input" for layer in layers if layer not in called})
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            reason = "nn.TransformerEncoderLayer reads its weight when it evaluates"
            reasons.update(dict.fromkeys((module.linear1, module.linear2), reason))
        if isinstance(module, nn.MultiheadAttention):
            reasons[module.out_proj] = "nn.MultiheadAttention reads its weight"
    return reasons


@contextmanager
def _readers(layers: list[nn.Module]) -> Iterator[set[nn.Module]]:
    """Collect the layers whose weight or bias is read by other code than their own forward.

    Parameters are no plain attributes: reading one goes through `nn.Module.__getattr__`.
    """
    read: set[nn.Module] = set()
    running: list[nn.Module] = []
    watched = set(layers)
    original = nn.Module.__getattr__

    def spy(module: nn.Module, name: str) -> Any:
        if name in ("weight", "bias") and module in watched and module not in running:
            read.add(module)
        return original(module, name)

    handles = [layer.register_forward_pre_hook(lambda m, _: running.append(m)) for layer in layers]
    handles += [layer.register_forward_hook(lambda *_: running.pop() and None) for layer in layers]
    nn.Module.__getattr__ = spy  # type: ignore[method-assign]
    try:
        yield read
    finally:
        nn.Module.__getattr__ = original  # type: ignore[method-assign]
        for handle in handles:
            handle.remove()
