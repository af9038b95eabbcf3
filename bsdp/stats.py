"""Parameters, multiply-adds and latency of a model, and what its pairs contribute."""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bsdp.compiling import uncompiled
from bsdp.cost import LayerCost, ModelCost, Positions, layer_cost
from bsdp.latency import LatencyTable
from bsdp.layers import BasisPair, named_pairs, watching
from bsdp.plain_layers import SUPPORTED_TYPES, is_transposed, layer_outputs
from bsdp.probing import as_inputs, evaluating, probe
from bsdp.scale_hooks import drop_scales, scales_of
from bsdp.timing import time_in_turn
from bsdp.widths import original_widths, set_widths, widths_of


@dataclass(frozen=True)
class LayerStats:
    """One convolution or linear layer.

    Attributes:
        name: Dotted name.
        kind: How it is deployed: ``"pair"``, ``"fused"`` or ``"plain"`` (never decomposed).
        rank: Basis vectors per group; the full rank of a plain layer.
        full_rank: Largest rank per group.
        break_even_rank: Rank at which pair and fused layer cost the same.
        params: Parameters as deployed, bias included.
        params_original: Parameters of the original layer, bias included.
        macs: Multiply-adds per example as deployed; None without an example input.
        macs_original: Multiply-adds of the original layer.
    """

    name: str
    kind: str
    rank: int
    full_rank: int
    break_even_rank: float
    params: int
    params_original: int
    macs: int | None
    macs_original: int | None


@dataclass(frozen=True)
class ModelStats:
    """A model and its layers; the denominators are the original, undecomposed model with its head.

    Attributes:
        params: Parameters of the folded model: head, biases and batch norms count, buffers do not.
        params_original: Parameters of the original model.
        macs: Multiply-adds of the folded model for one example, as fvcore counts them (one multiply-add is one).
        macs_original: Multiply-adds of the original model.
        layers: One entry per convolution and linear layer.
    """

    params: int
    params_original: int
    macs: int | None
    macs_original: int | None
    layers: tuple[LayerStats, ...]

    @property
    def params_kept(self) -> float:
        """Share of the parameters kept."""
        return self.params / max(self.params_original, 1)

    @property
    def macs_kept(self) -> float | None:
        """Share of the multiply-adds kept."""
        return None if self.macs is None or not self.macs_original else self.macs / self.macs_original

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title="Layers (MACs are fvcore's multiply-adds for one example)")
        table.add_column("layer", overflow="fold")
        for column in ("form", "rank", "full", "break-even", "params", "kept", "MACs", "kept"):
            table.add_column(column, justify="right")
        for s in self.layers:
            macs_kept = "-" if s.macs is None or not s.macs_original else f"{s.macs / s.macs_original:.1%}"
            table.add_row(
                *(s.name, s.kind, str(s.rank), str(s.full_rank), f"{s.break_even_rank:.1f}", f"{s.params:,}"),
                *(f"{s.params / s.params_original:.1%}", "-" if s.macs is None else f"{s.macs:,}", macs_kept),
            )
        console = Console(width=110, color_system=None)
        with console.capture() as capture:
            console.print(table)
            console.print(
                f"whole model, head included: {self.params:,} of {self.params_original:,} parameters "
                f"({self.params_kept:.1%} kept)"
            )
            if self.macs is not None and self.macs_kept is not None:
                console.print(f"{self.macs:,} of {self.macs_original:,} MACs ({self.macs_kept:.1%} kept)")
        return capture.get().rstrip()


def count_macs(model: nn.Module, example_input: Tensor | tuple[Tensor, ...]) -> int:
    """Multiply-adds of one forward pass in eval mode, by fvcore's `FlopCountAnalysis` (batch size 1 for one example).

    What fvcore does not know is added: convolutions with ``padding="same"`` or ``"valid"``, and scaled-dot-product
    attention as its two matrix products. Where its tracer cannot follow a model (a detector that takes a list of
    images, say) it is half of what torch's `FlopCounterMode` counts: the same for convolutions and matrix products,
    and nothing for the few operations on norms and pooling that fvcore includes.
    """
    inputs = as_inputs(example_input)
    with evaluating(model), uncompiled(model), _attention_in_parts(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore leans on torch.jit, which warns of its deprecation, also on import
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model, inputs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
        analysis.set_op_handle("aten::_convolution_mode", _convolution_macs)
        try:
            return int(analysis.total())
        except Exception:
            return _count_while_running(model, inputs)


def _count_while_running(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:  # the counter trips over views of them when gradients are off
            parameter.requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return int(counter.get_total_flops()) // 2


def measure_cost(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    *,
    new_bias: bool = True,
    latency: LatencyTable | None = None,
) -> ModelCost:
    """Measure what a decomposed model costs as a function of its ranks.

    Args:
        model: A decomposed model.
        example_input: One example, batch size 1. None leaves MACs unmeasured.
        new_bias: Whether `prune` will be given means, which turn into biases that count as parameters.
        latency: Measured times of this model's layers. They count as the kind ``"latency"``, and the pairs are told
            from which rank down they are deployed as two layers.

    Raises:
        ValueError: If the table is of another network.

    Warns:
        UserWarning: If it was measured on inputs of another size.
    """
    if latency is not None:
        shapes = [] if example_input is None else [tensor.shape for tensor in as_inputs(example_input)]
        if shapes and (problem := latency.other_inputs(shapes)):
            warnings.warn(problem, stacklevel=2)
        cost = measure_cost(model, example_input, new_bias=new_bias).with_latency(latency)
        limit_pairs(model, cost)
        return cost
    pairs = named_pairs(model)
    inside = {id(p) for pair in pairs.values() for p in pair.parameters()}
    inside |= {id(scales.weight) for scales in map(scales_of, model.modules()) if scales is not None}  # they fold away
    fixed_params = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    if example_input is None:
        return ModelCost({n: layer_cost(p) for n, p in pairs.items()}, fixed_params, None, new_bias)
    positions = measure_positions(model, pairs, example_input)
    layers = {name: layer_cost(pair, positions=positions[name]) for name, pair in pairs.items()}
    inner = sum(layers[name].slope("macs") * pair.rank for name, pair in pairs.items())
    products = sum(pair.reads * pair.rank * layers[name].fused for name, pair in pairs.items())
    macs = (count_macs(model, example_input) - products) // _batch_size(as_inputs(example_input))
    return ModelCost(layers, fixed_params, macs - inner, new_bias)


def original_cost(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    *,
    cost: ModelCost | None = None,
    new_bias: bool = True,
) -> ModelCost:
    """The cost of a model as it was before it lost channels; of one that lost none, that of `measure_cost`.

    Args:
        model: A plain or decomposed model.
        example_input: See `measure_cost`.
        cost: What `measure_cost` says of the model as it is, if that is known.
        new_bias: See `measure_cost`.
    """
    if widths_of(model):
        model = copy.deepcopy(model)
        drop_scales(model)
        set_widths(model, {})
    elif cost is not None:
        return cost
    return measure_cost(model, example_input, new_bias=new_bias)


def limit_pairs(model: nn.Module, cost: ModelCost) -> None:
    """Tell the pairs of a model from which rank down they are deployed as two layers, where times were measured."""
    for name, pair in named_pairs(model).items():
        if cost.layers[name].latency is not None:
            pair.pair_limit = cost.layers[name].pair_limit


def measure_positions(
    model: nn.Module, layers: Mapping[str, nn.Module], example_input: Tensor | tuple[Tensor, ...]
) -> dict[str, Positions]:
    """Positions per example of each layer, summed over its calls; zeros for a layer that is not called.

    Pairs also learn whether the model needs them whole, see `BasisPair`. Batch norms may be among the layers.
    """
    positions = dict.fromkeys(layers, Positions(0, 0))
    names = {layer: name for name, layer in layers.items()}
    arguments = as_inputs(example_input)
    batch = _batch_size(arguments)

    def observe(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        channels = getattr(layer, "num_features", 0) or layer_outputs(layer)
        outputs = weights = output.numel() // (channels * batch)
        if is_transposed(layer):
            weights = inputs[0].numel() // (layer.in_channels * batch)  # type: ignore[operator]
        seen = positions[names[layer]]
        positions[names[layer]] = Positions(seen.weights + weights, seen.outputs + outputs)

    with probe(model, layers.values(), observe), watching(layers.values()):
        model(*arguments)
    return positions


def describe(model: nn.Module, example_input: Tensor | tuple[Tensor, ...] | None = None) -> ModelStats:
    """Describe a decomposed, pruned or plain model as it would be deployed; prints as a table.

    Args:
        model: Any model. A folded one counts as plain: describe the decomposed model to see its ranks.
        example_input: Input (or tuple of inputs) of the model with batch size 1, for the MACs.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
        >>> _ = bsdp.decompose(model, include=["2"])
        >>> bsdp.describe(model, torch.zeros(1, 3, 8, 8)).layers[1].break_even_rank
        57.6
    """
    layers = described_layers(model)
    positions = None if example_input is None else measure_positions(model, layers, example_input)
    cost = measure_cost(model, example_input)
    original = original_cost(model, example_input, cost=cost)
    rows = []
    for name, layer in layers.items():
        seen = None if positions is None else positions[name]
        rows.append(_layer_stats(name, layer, seen))
    pairs = named_pairs(model)
    params = cost.fixed_params + sum(row.params for row in rows if row.name in pairs)
    macs = None
    if cost.fixed_macs is not None:
        macs = cost.fixed_macs + sum(row.macs or 0 for row in rows if row.name in pairs)
    return ModelStats(
        params=params,
        params_original=original.original("params"),
        macs=macs,
        macs_original=None if original.fixed_macs is None else original.original("macs"),
        layers=tuple(rows),
    )


def measure_latency(
    models: Mapping[str, nn.Module],
    example_input: Tensor | tuple[Tensor, ...],
    *,
    repeats: int = 30,
    warmup: int = 5,
) -> dict[str, float]:
    """Median time of one forward pass per model, measured in turn so that all see the same machine.

    Args:
        models: Models by name, on the device of the input.
        example_input: Input (or tuple of inputs); its batch size is the one that is timed.
        repeats: Timed passes per model.
        warmup: Passes before them.

    Returns:
        Milliseconds per name, in eval mode with the threads that torch is set to.
    """
    inputs = as_inputs(example_input)
    cuda = any(isinstance(t, Tensor) and t.is_cuda for t in inputs)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode())
        calls = {name: partial(model, *inputs) for name, model in models.items()}
        times = time_in_turn(calls, repeats=repeats, warmup=warmup, cuda=cuda)
    return {name: statistics.median(values) for name, values in times.items()}


def described_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All convolutions, linear layers and pairs of a model by name."""
    inside = {child for pair in named_pairs(model).values() for child in pair.modules() if child is not pair}
    described: tuple[type[nn.Module], ...] = (BasisPair, *SUPPORTED_TYPES)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, described)}
    return {name: layer for name, layer in layers.items() if layer not in inside}


def _layer_stats(name: str, layer: nn.Module, positions: Positions | None) -> LayerStats:
    cost = layer_cost(layer, positions=positions)
    kind, rank, has_bias = "plain", cost.full_rank, cost.bias
    if isinstance(layer, BasisPair):
        kind, rank, has_bias = cost.kind(layer.rank), layer.rank, layer.needs_bias
    pair = kind == "pair"
    measured = cost.positions is not None
    first = _original_cost(layer, cost)
    return LayerStats(
        name=name,
        kind=kind,
        rank=rank,
        full_rank=cost.full_rank,
        break_even_rank=cost.break_even_rank,
        params=(rank * cost.per_rank if pair else cost.fused) + (cost.out_channels if has_bias else 0),
        params_original=first.original(),
        macs=None if not measured else rank * cost.slope("macs") if pair else cost.original(kind="macs"),
        macs_original=first.original(kind="macs") if measured else None,
    )


def layer_rows(
    model: nn.Module, positions: Mapping[str, Positions] | None = None, *, new_bias: bool = True
) -> list[dict[str, Any]]:
    """One row of plain values per layer of a model that may have lost channels, as a summary has them.

    Args:
        model: A plain or decomposed model.
        positions: Positions of its layers (see `measure_positions`), which lost channels do not change.
        new_bias: Whether cuts of bases move means into biases, which then count.
    """
    rows = []
    for name, layer in described_layers(model).items():
        cost = layer_cost(layer, positions=None if positions is None else positions[name])
        pair = isinstance(layer, BasisPair)
        first = _original_cost(layer, cost)
        rank = layer.rank if isinstance(layer, BasisPair) else cost.full_rank
        kind = cost.kind(rank) if pair else "plain"
        deployed = replace(cost, whole=cost.whole or not pair)
        params, macs = deployed.deployed(rank, new_bias=new_bias and pair), None
        if positions is not None:
            macs = deployed.deployed(rank, kind="macs")
        originals = (first.original(), None if positions is None else first.original(kind="macs"))
        rows.append(
            {
                "name": name,
                "kind": kind,
                "rank": rank,
                "full_rank": first.full_rank,
                "groups": cost.groups,
                "channels": cost.out_channels,
                "channels_original": first.out_channels,
                "params": params,
                "params_original": originals[0],
                "params_kept": params / originals[0],
                "macs": macs,
                "macs_original": originals[1],
                "macs_kept": macs / originals[1] if originals[1] and macs is not None else None,
            }
        )
    return rows


def _original_cost(layer: nn.Module, cost: LayerCost) -> LayerCost:
    """The cost of a layer before it lost channels."""
    widths = original_widths(layer)
    whole = replace(cost, whole=True)
    if widths is None:
        return whole
    shape, groups = widths["shapes"]["weight"], int(widths["attributes"].get("groups", cost.groups))
    outputs = shape[1] * groups if is_transposed(layer) else shape[0]
    fan_in = math.prod(shape) // outputs
    return replace(whole, fan_in=fan_in, out_channels=outputs, groups=groups, full_rank=min(fan_in, outputs // groups))


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Keep attention from running as one fused operator, of which nothing would be counted."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _batch_size(inputs: tuple[Any, ...]) -> int:
    return next((t.shape[0] for t in inputs if isinstance(t, Tensor) and t.dim()), 1)


def _attention_macs(inputs: list[Any], _outputs: list[Any]) -> int:
    query, key, value = (_sizes(i) for i in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _convolution_macs(inputs: list[Any], outputs: list[Any]) -> int:
    return math.prod(_sizes(outputs[0])) * math.prod(_sizes(inputs[1])[1:])


def _sizes(value: Any) -> list[int]:
    """Sizes of a tensor in a traced graph."""
    sizes: list[int] = value.type().sizes()
    return sizes
