"""Gates on basis vectors whose forward pass is nearly binary and whose gradient is that of a softer gate.

PUBLISHED (Colombo, Gao, arXiv 2107.03375, abstract only): sub-architectures are found independently of the weights, as
a complexity-penalised choice of a subset, by a relaxation with two temperatures; the structure transfers to other
tasks. The paper's equations were not readable to us and we know of no public code. RECONSTRUCTED, with low certainty::

    E = 1[theta > 0], relaxed to sigma_T(theta) = sigmoid(T theta)
    forward with the hard T = M, gradient through the soft T = m << M:
    theta <- theta - eta * (dL/dE at E = sigma_M(theta) + lambda * cost) * sigma_m'(theta)

OURS: weights and gates take turns. The weights make `interval` steps under fixed gates, then theta makes one with the
gradient averaged over these states of the weights, so that no single state decides. `eta` is divided by the size of
dL/dE (a running root mean square over all gates) plus that of lambda * cost, one number for the whole model, so that
one rate fits every network and no step drives gates to where they no longer learn. The cost of a basis is its marginal
deployed cost as a share of the original model. `lambda` is fixed, or follows by how much the open gates cost more than
a budget, now and summed up so far. The strongest gate of a layer is always open. What a search has found is the mean
of the gates over its last steps: near a minimum dL/dE of an open gate vanishes, so a useful one does not rest but falls
shut and is thrown open again, and of a quadratic loss the share of time in which it is open is above 1/2 just where
closing it would cost more than it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bsdp._checks import check_at_least, check_share, check_whole
from bsdp.compiling import uncompiled
from bsdp.cost import ModelCost
from bsdp.importance import NoScoresError
from bsdp.layers import BasisPair

_MEMORY = 0.9  # of the running mean square of the gradient
_WINDOW = 50  # steps of the gates over which they are averaged
_TIE = 1e-3
_EXCESS, _SUM_OF_EXCESS = 10.0, 0.1  # how lambda follows the budget; the first damps what the second would overshoot


def hard_gate(theta: Tensor, temperature: float) -> Tensor:
    """The gate ``sigmoid(temperature * theta)``; exactly ``1[theta > 0]`` for an infinite temperature.

    Args:
        theta: One number per gate.
        temperature: The steepness; the higher, the closer to binary.

    Example:
        >>> hard_gate(torch.tensor([-0.1, 0.0, 0.1]), math.inf)
        tensor([0., 0., 1.])
    """
    if math.isinf(temperature):
        return (theta > 0).to(theta.dtype)
    return torch.sigmoid(temperature * theta)


def soft_slope(theta: Tensor, temperature: float) -> Tensor:
    """Derivative of ``sigmoid(temperature * theta)``, through which gates learn.

    Args:
        theta: One number per gate.
        temperature: The steepness; finite.
    """
    gate = torch.sigmoid(temperature * theta)
    return temperature * gate * (1.0 - gate)


def gate_step(
    theta: Tensor,
    gradient: Tensor,
    cost: Tensor,
    *,
    penalty: float | Tensor,
    soft: float,
    learning_rate: float | Tensor,
) -> Tensor:
    """One step of the gates: ``theta - eta * (dL/dE + lambda * cost) * sigma_m'(theta)``.

    Args:
        theta: One number per gate.
        gradient: ``dL/dE`` at the gates ``E`` of the forward pass.
        cost: What an open gate costs.
        penalty: lambda.
        soft: The soft temperature m.
        learning_rate: eta.
    """
    return theta - learning_rate * (gradient + penalty * cost) * soft_slope(theta, soft)


def check_temperatures(hard: float, soft: float) -> None:
    """Refuse temperatures that are not above 0, an infinite soft one, and a hard one below the soft one."""
    if not 0.0 < soft < math.inf or not soft <= hard:
        raise ValueError(
            f"`soft` must be above 0 and finite and `hard` no less than it, got hard={hard!r}, soft={soft!r}. "
            "`hard: .inf` makes the forward pass exactly binary."
        )


class TwoTemperatureGates:
    """One gate per basis vector, multiplied into the features between the two layers of each pair.

    Gates act while `applied` is open and leave nothing behind. They are no parameters: call `update` once per optimizer
    step, between backward and step, and they move by their own rule.

    Args:
        pairs: The pairs to search, by name. Those that no cut can make cheaper get no gates.
        cost: The model's cost; must have been measured for `kind`.
        kind: What costs count: ``"params"``, ``"macs"`` or ``"bases"``.
        hard: Temperature of the forward pass; infinity for binary gates.
        soft: Temperature of the gradient.
        penalty: lambda, in units of the loss for the whole original model; None to adapt it to `budget`.
        budget: Share of the original cost that the open gates may have; needed without `penalty`. It may be changed
            between steps.
        learning_rate: Step of theta for a gradient of average size.
        interval: Steps of the weights for one of the gates.
        start: Initial theta of all gates.
        average: Averages a tensor over the processes of a distributed run, so that all have the same gates.

    Attributes:
        theta: The numbers behind the gates, all layers one after another.
        mean: The gates averaged over the last steps.
        penalty: lambda in the last step of the gates.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = bsdp.decompose(model)
        >>> gates = TwoTemperatureGates(bsdp.named_pairs(model), bsdp.measure_cost(model), penalty=100.0, interval=1)
        >>> for _ in range(200):
        ...     with gates.applied():
        ...         model(torch.ones(4, 8)).square().mean().backward()
        ...     gates.update()
        >>> gates.ranks()
        {'0': 1}
    """

    def __init__(
        self,
        pairs: Mapping[str, BasisPair],
        cost: ModelCost,
        *,
        kind: str = "params",
        hard: float = 20.0,
        soft: float = 1.0,
        penalty: float | None = None,
        budget: float | None = None,
        learning_rate: float = 0.1,
        interval: int = 2,
        start: float = 0.5,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_temperatures(hard, soft)
        check_whole("interval", interval, 1)
        if penalty is not None:
            check_at_least("penalty", penalty, 0.0)
        elif budget is None:
            raise ValueError("give a `penalty`, or a `budget` to which it is adapted.")
        else:
            check_share("budget", budget)
        self.pairs = {name: pair for name, pair in pairs.items() if cost.layers[name].cuttable}
        if not self.pairs:
            raise ValueError("`pairs` has no layer that cuts could make cheaper, so there is nothing to search.")
        self.all_pairs, self.model_cost, self.kind = dict(pairs), cost, kind
        self.hard, self.soft, self.learning_rate, self.interval = hard, soft, learning_rate, interval
        self.budget = budget if penalty is None else None
        self.penalty = 0.0 if penalty is None else float(penalty)
        self.average = average or (lambda tensor: tensor)
        self._sizes = [pair.scaling.delta.numel() for pair in self.pairs.values()]
        like = next(iter(self.pairs.values())).scaling.delta
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.theta = torch.full((sum(self._sizes),), float(start), device=like.device, dtype=dtype)
        self.costs = torch.cat([self._cost_of(name, like=self.theta) for name in self.pairs])
        self._gates = self._forward_gates().requires_grad_(True)
        self.mean = self._gates.detach().clone()
        self._sum, self._finite = torch.zeros_like(self.theta), torch.zeros((), device=like.device)
        self._updates = self.steps = 0
        self._square = self._dual = 0.0
        self._scale = 1.0

    def _cost_of(self, name: str, *, like: Tensor) -> Tensor:
        layer, pair = self.model_cost.layers[name], self.pairs[name]
        share = layer.slope(self.kind) / layer.groups / self.model_cost.original(self.kind)
        return like.new_full((pair.scaling.delta.numel(),), share)

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Cut a vector of all gates into layers, ``{name: [groups * rank]}``."""
        return dict(zip(self.pairs, torch.split(values, self._sizes), strict=True))

    def _forward_gates(self) -> Tensor:
        gates = hard_gate(self.theta, self.hard)
        parts = zip(self.pairs.values(), *(torch.split(v, self._sizes) for v in (self.theta, gates)), strict=True)
        for pair, theta, gate in parts:  # a layer without any open gate would cut the network in two
            strongest = theta.view(pair.groups, -1).argmax(1, keepdim=True)
            gate.view(pair.groups, -1).scatter_(1, strongest, 1.0)
        return gates

    @property
    def gates(self) -> dict[str, Tensor]:
        """The gates of the forward pass by layer, ``[groups * rank]``."""
        return self.split(self._gates.detach())

    @contextmanager
    def applied(self, scale: float = 1.0) -> Iterator[None]:
        """Multiply the gates into the features of every forward pass inside the ``with`` block.

        Args:
            scale: What the loss is multiplied with, under mixed precision.
        """
        self._scale = scale
        # First of all hooks, so that statistics of the features are those of the gated ones.
        handles = [p.basis.register_forward_hook(self._hook(n), prepend=True) for n, p in self.pairs.items()]
        try:
            with uncompiled():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        position = list(self.pairs).index(name)
        first, size, dims = sum(self._sizes[:position]), self._sizes[position], self.pairs[name].scaling.dims

        def multiply(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            gate = self._gates[first : first + size].to(output.dtype)
            return output * gate.view(-1, *(1,) * dims)

        return multiply

    @torch.no_grad()
    def update(self) -> None:
        """Take the gradient since the last call; every `interval` calls the gates move.

        Without a forward pass under `applied` since then, nothing happens. NaN and infinity count for nothing.
        """
        gradient, self._gates.grad = self._gates.grad, None
        if gradient is None:
            return
        gradient = gradient.to(self.theta.dtype) / self._scale
        finite = gradient.isfinite().all()
        self._sum = self._sum + torch.where(finite, gradient, 0.0)
        self._finite = self._finite + finite.float()
        self._updates += 1
        if self._updates >= self.interval:
            self.reduce(self.average)
            self._move()
            self._sum, self._finite = torch.zeros_like(self._sum), torch.zeros_like(self._finite)
            self._updates = 0

    def _move(self) -> None:
        if not self._finite > 0:
            return
        gradient = self._sum / self._finite
        square = float(gradient.square().mean())
        self._square = square if self._square == 0.0 else _MEMORY * self._square + (1.0 - _MEMORY) * square
        size, size_of_costs = math.sqrt(self._square), float(self.costs.square().mean().sqrt())
        if self.budget is not None:
            excess = self.cost_share(now=True) - self.budget
            self._dual = max(0.0, self._dual + _SUM_OF_EXCESS * excess)
            self.penalty = max(0.0, self._dual + _EXCESS * excess) * size / size_of_costs
        whole = size + self.penalty * size_of_costs
        if whole == 0.0:
            return
        rate = self.learning_rate / whole
        self.theta = gate_step(
            self.theta, gradient, self.costs, penalty=self.penalty, soft=self.soft, learning_rate=rate
        )
        self._gates.data = self._forward_gates()
        self.steps += 1
        self.mean = self.mean + (self._gates.detach() - self.mean) / min(self.steps, _WINDOW)

    def ranks(self, *, now: bool = False) -> dict[str, int]:
        """The structure: gates per group and layer that are open on average, the widest group counting; at least 1.

        Args:
            now: Take the gates as they are at this step.
        """
        found = {}
        for name, gates in self.split(self._gates.detach() if now else self.mean).items():
            widest = (gates.view(self.pairs[name].groups, -1) > 0.5).sum(1).max()
            found[name] = max(1, int(widest))
        return found

    def cost_share(self, *, now: bool = False) -> float:
        """Deployed cost of `ranks` as a share of the original cost.

        Args:
            now: As there.
        """
        ranks = {name: pair.rank for name, pair in self.all_pairs.items()} | self.ranks(now=now)
        return self.model_cost.deployed(ranks, self.kind) / self.model_cost.original(self.kind)

    def open_share(self) -> float:
        """Share of the gates that are open on average."""
        return float((self.mean > 0.5).float().mean())

    def scores(self) -> dict[str, Tensor]:
        """The mean gates, by which the bases of all pairs can be ranked; theta decides between equal ones.

        Layers without gates get ones.

        Raises:
            NoScoresError: If the gates have never moved.
        """
        if self.steps == 0:
            raise NoScoresError("the gates have not moved: no step had a finite gradient.")
        whole = {name: torch.ones_like(pair.scaling.delta.detach()) for name, pair in self.all_pairs.items()}
        return whole | self.split(self.mean + _TIE * hard_gate(self.theta, self.soft))

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace the gradients that wait by their mean over processes."""
        self._sum, self._finite = reduce(self._sum), reduce(self._finite)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint."""
        numbers = {"updates": self._updates, "steps": self.steps, "square": self._square, "dual": self._dual}
        tensors = {"theta": self.theta, "mean": self.mean, "sum": self._sum, "finite": self._finite}
        return {**tensors, "penalty": self.penalty, **numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; the pairs must have the ranks they had then."""
        if state["theta"].shape != self.theta.shape:
            raise ValueError(
                f"the saved gates are {len(state['theta'])}, but the model has {len(self.theta)}: they are of other "
                "ranks."
            )
        self.theta, self._sum = state["theta"].to(self.theta), state["sum"].to(self.theta)
        self.mean, self._finite = state["mean"].to(self.theta), state["finite"].to(self._finite)
        self._updates, self.steps = int(state["updates"]), int(state["steps"])
        self._square, self._dual = float(state["square"]), float(state["dual"])
        if self.budget is not None:
            self.penalty = float(state["penalty"])
        self._gates.data = self._forward_gates()
