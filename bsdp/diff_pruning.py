"""Diff pruning: a task as a sparse difference to a frozen network (Guo, Rush, Kim, arXiv 2012.07463, ACL 2021).

PUBLISHED: every parameter is theta_pretrained + z * w, with hard-concrete gates z (see `bsdp.hard_concrete`) and w
starting at 0; the loss gets lambda times the expected number of entries that are not 0. Structured: a second gate per
matrix or bias multiplies all its entries, and the penalty is the product of both probabilities. Then only the largest
share of |delta| is kept, over all parameters together, and these entries train on with the others fixed at 0. Stored
per task is the delta alone (0.5 % of BERT in the paper). Inference does not get smaller or faster.

OUR CHOICES: the gates of projection and evaluation are those without noise; parameters are those of convolutions,
linear layers and, if wanted, the affine terms of normalisation layers, whose running statistics stay those of the
backbone. One group is one parameter, as published.

The delta is a parametrization of each parameter (``torch.nn.utils.parametrize``), so the frozen values are never
written to, and code that reads ``layer.weight`` sees the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from bsdp._checks import check_patterns, check_share, matches
from bsdp.hard_concrete import check_stretch, deterministic_gates, open_probability, sample_gates, uniform_noise
from bsdp.layers import named_pairs
from bsdp.surgery import module_names

_LAYERS = (_ConvNd, nn.Linear)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


class SparseDelta(nn.Module):
    """The difference that one parameter gets: gated at first, on a fixed mask after `fix`.

    A state dict of either form can be loaded into either; the module takes the form of what it loads.

    Args:
        like: The parameter.
        structured: Have a gate for the whole parameter, too.
        low: Lower end of the gates' stretched interval, below 0.
        high: Upper end, above 1.
        alpha: Initial alpha of all gates.
    """

    mask: Tensor | None

    def __init__(
        self, like: Tensor, *, structured: bool = True, low: float = -1.5, high: float = 1.5, alpha: float = 5.0
    ) -> None:
        super().__init__()
        self.structured, self.low, self.high, self.start = structured, low, high, alpha
        self.value = nn.Parameter(torch.zeros_like(like, requires_grad=False))
        self.register_buffer("mask", None)
        self.noise: list[Tensor] = []  # drawn once per step, so that every read of the weight sees the same gates
        self.open_gates()

    @property
    def fixed(self) -> bool:
        """Whether the mask is fixed."""
        return self.mask is not None

    def alphas(self) -> list[nn.Parameter]:
        """The trainable numbers behind the gates; none once the mask is fixed."""
        return [alpha for alpha in (self.alpha, self.group_alpha) if alpha is not None]

    def forward(self, original: Tensor) -> Tensor:
        """The parameter with its delta."""
        return original + self.delta(noisy=self.training)

    def delta(self, *, noisy: bool = False) -> Tensor:
        """The delta in the shape of the parameter.

        Args:
            noisy: Use the noise of the last `draw`, if there was one since the gates opened.
        """
        if self.mask is not None:
            return self.value * self.mask
        noise = self.noise if noisy and self.noise else [None] * len(self.alphas())
        delta: Tensor = self.value
        for alpha, drawn in zip(self.alphas(), noise, strict=True):
            delta = delta * self._gates(alpha, drawn)
        return delta

    def draw(self, generator: torch.Generator) -> None:
        """Draw the noise of the gates for the next step."""
        self.noise = [uniform_noise(alpha, generator=generator) for alpha in self.alphas()]

    def expected_l0(self) -> Tensor:
        """Expected number of entries that are not 0, differentiable; the number of the mask once it is fixed."""
        if self.mask is not None:
            return self.mask.sum()
        product = torch.ones((), device=self.value.device)
        for alpha in self.alphas():
            product = product * open_probability(alpha, low=self.low, high=self.high)
        return product.sum()

    def fix(self, mask: Tensor) -> None:
        """Turn gated values into plain ones, keep those of a mask, and drop the gates.

        Args:
            mask: True for the entries to keep, in the shape of the parameter.
        """
        with torch.no_grad():
            self.value.copy_(torch.where(mask, self.delta(), 0.0))
        self.close_gates(mask)

    def _gates(self, alpha: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            return deterministic_gates(alpha, low=self.low, high=self.high)
        return sample_gates(alpha, noise, low=self.low, high=self.high)

    def open_gates(self) -> None:
        """Begin with new gates, all at the initial alpha."""
        self.mask = None
        self.alpha = nn.Parameter(torch.full_like(self.value, self.start, requires_grad=False))
        self.group_alpha = nn.Parameter(self.value.new_full((), self.start)) if self.structured else None

    def close_gates(self, mask: Tensor) -> None:
        """Drop the gates, with the values as they are.

        Args:
            mask: True for the entries to keep.
        """
        self.mask, self.noise = mask.to(self.value.device), []
        self.alpha = self.group_alpha = None  # type: ignore[assignment]

    def follow_state(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Take the form of a state dict that is loaded next; this delta's names in it begin with `prefix`."""
        mask = state_dict.get(f"{prefix}mask")
        if mask is None and self.fixed and f"{prefix}alpha" in state_dict:
            self.open_gates()
        elif isinstance(mask, Tensor) and not self.fixed:
            self.close_gates(torch.zeros_like(self.value, dtype=torch.bool))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.follow_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def attach_deltas(
    model: nn.Module,
    *,
    exclude: Iterable[str] | None = None,
    norms: bool = True,
    structured: bool = True,
    low: float = -1.5,
    high: float = 1.5,
    alpha: float = 5.0,
) -> dict[str, SparseDelta]:
    """Give the parameters of a model trainable deltas that start at 0, and freeze the parameters themselves.

    Parameters that are shared by several layers, parametrized already or not of a convolution, a linear or a
    normalisation layer get none and are left as they are.

    Args:
        model: The model, changed in place.
        exclude: Name patterns of modules that get no delta, such as the head.
        norms: Whether weights and biases of normalisation layers get deltas, too.
        structured: Give every parameter one gate for all its entries, too.
        low: Lower end of the gates' stretched interval, below 0.
        high: Upper end, above 1.
        alpha: Initial alpha of all gates.

    Returns:
        The deltas by the names of their parameters.

    Raises:
        ValueError: If the model is decomposed or has deltas already, an argument is not allowed, or nothing is left.
    """
    check_stretch(low, high)
    if named_pairs(model) or named_deltas(model):
        raise ValueError(
            "deltas need a plain model, and this one "
            f"{'is decomposed: build it anew' if named_pairs(model) else 'has deltas: detach them first'}."
        )
    patterns = check_patterns("exclude", exclude, [name for name, _ in model.named_modules() if name])
    found = delta_parameters(model, patterns, norms=norms)
    if not found:
        raise ValueError("no convolution or linear layer is left to get a delta; check `exclude`.")
    return put_deltas(model, found, structured=structured, low=low, high=high, alpha=alpha)


def put_deltas(model: nn.Module, parameters: Iterable[str], **options: Any) -> dict[str, SparseDelta]:
    """Attach deltas to the parameters of these names, see `attach_deltas`; `options` are those of `SparseDelta`."""
    for name in parameters:
        parent, _, child = name.rpartition(".")
        layer, parameter = model.get_submodule(parent), model.get_parameter(name)
        delta = SparseDelta(parameter, **options).train(layer.training)
        parametrize.register_parametrization(layer, child, delta, unsafe=True)
        parameter.requires_grad_(False)
    return named_deltas(model)


def delta_parameters(model: nn.Module, exclude: Iterable[str] = (), *, norms: bool = True) -> dict[str, nn.Parameter]:
    """The parameters of a plain model that can get a delta, once each, by name; see `attach_deltas`."""
    kinds, patterns = _LAYERS + (_NORMS if norms else ()), list(exclude)
    names = module_names(model)
    owners: dict[nn.Parameter, int] = {}
    for module in names:
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    return {
        f"{group[0]}.{child}" if group[0] else child: parameter
        for module, group in names.items()
        if isinstance(module, kinds) and not any(matches(name, patterns) for name in group if name)
        for child, parameter in module.named_parameters(recurse=False)
        if child in ("weight", "bias") and owners[parameter] == 1 and not is_lazy(parameter)
        if parameter.is_floating_point() and not parametrize.is_parametrized(module)
    }


def named_deltas(model: nn.Module) -> dict[str, SparseDelta]:
    """The deltas of a model by the names of their parameters."""
    return {
        name.replace("parametrizations.", "").removesuffix(".0"): module
        for name, module in model.named_modules()
        if isinstance(module, SparseDelta)
    }


def detach_deltas(model: nn.Module, *, merge: bool = False) -> None:
    """Take all deltas off a model; its frozen parameters are then the very ones from before, bit for bit.

    Args:
        model: The model, changed in place.
        merge: Write parameter + delta into the parameters, which ends the sharing of the backbone.
    """
    for layer in {model.get_submodule(name.rpartition(".")[0]) for name in named_deltas(model)}:
        own: dict[str, Any] = dict(layer._parameters)
        groups: Any = layer.parametrizations
        for child, group in groups.items():
            own[child] = group.original
            if merge:
                own[child].data = getattr(layer, child).detach()
        # Not by `remove_parametrizations`, which changes the class, and copies of a layer share it.
        layer.__class__ = type(layer).__mro__[1]
        del layer._modules["parametrizations"]
        layer._parameters.clear()
        layer._parameters.update({child: own[child] for child in sorted(own, key=lambda c: (c != "weight", c))})


def expected_l0(deltas: Mapping[str, SparseDelta]) -> Tensor:
    """Expected number of non-zero entries of all deltas: the penalty, without its factor, differentiable."""
    return torch.stack([delta.expected_l0().float() for delta in deltas.values()]).sum()


def size_of(deltas: Mapping[str, SparseDelta]) -> int:
    """Number of entries of all deltas, zero or not."""
    return sum(delta.value.numel() for delta in deltas.values())


def strongest_entries(deltas: Mapping[str, SparseDelta], density: float) -> Tensor:
    """Indices, ascending, of the largest entries of |delta| in the concatenation of all deltas; the first of equals.

    Args:
        deltas: From `attach_deltas`.
        density: Share of all entries; exactly ``round(density * number)``, but at least one, are given.

    Raises:
        ValueError: If `density` is not in (0, 1), or a delta is NaN or infinite.
    """
    check_share("density", density)
    with torch.no_grad():
        sizes = torch.cat([delta.delta().abs().flatten().float() for delta in deltas.values()])
    if not sizes.isfinite().all():
        raise ValueError("a delta is NaN or infinite, so its largest entries are not known: lower the learning rate.")
    count = max(1, round(density * sizes.numel()))
    return sizes.argsort(descending=True, stable=True)[:count].sort().values


def keep_entries(deltas: Mapping[str, SparseDelta], kept: Tensor) -> None:
    """Fix the masks of all deltas to the given entries.

    Args:
        deltas: From `attach_deltas`.
        kept: From `strongest_entries`.
    """
    mask = torch.zeros(size_of(deltas), dtype=torch.bool)
    mask[kept.cpu()] = True
    parts = torch.split_with_sizes(mask, [delta.value.numel() for delta in deltas.values()])
    for delta, part in zip(deltas.values(), parts, strict=True):
        delta.fix(part.view(delta.value.shape).to(delta.value.device))


def project_deltas(deltas: Mapping[str, SparseDelta], density: float) -> int:
    """Keep exactly the largest share of |delta| over all parameters; these train on, the others stay 0.

    Args:
        deltas: From `attach_deltas`.
        density: Share of all entries to keep, in (0, 1).

    Returns:
        The number of entries kept.
    """
    kept = strongest_entries(deltas, density)
    keep_entries(deltas, kept)
    return kept.numel()
