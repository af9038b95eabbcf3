"""Removing bases: parity with masking, mean-to-bias, and optimizers that go on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp.layers import named_pairs
from bsdp.optimizer_state import cut_state, drop_stale_state
from bsdp.pruning import mean_contribution
from bsdp.selection import PruningPlan
from tests.helpers.compare import (
    assert_same_state,
    decomposed,
    is_channels_last,
    randomize_scales,
    relative_error,
    snapshot,
)
from tests.helpers.nets import NETS, make_input, make_net
from tests.helpers.reference import masked


def plan_for(net: nn.Module, *, ratio: float = 0.5) -> PruningPlan:
    """A plan by random scores."""
    importance = {name: torch.rand(pair.scaling.delta.numel()) for name, pair in named_pairs(net).items()}
    return bsdp.select(importance, bsdp.measure_cost(net), ratio=ratio)


def feature_means(net: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Means of the features on one batch."""
    statistics = bsdp.FeatureStatistics(named_pairs(net))
    with torch.no_grad(), statistics.collecting():
        net(inputs)
    return statistics.means()


def pruned_and_masked(name: str, *, with_means: bool) -> tuple[nn.Module, nn.Module]:
    """The same cut made twice: once for real, once by scaling factors of zero."""
    net = decomposed(make_net(name))
    randomize_scales(net)
    plan = plan_for(net)
    assert plan.removed > 0
    other = copy.deepcopy(net)
    means = feature_means(net, make_input(name) + 1.0) if with_means else None
    bsdp.prune(net, plan, means=means)
    if means is not None:
        with torch.no_grad():
            for layer, pair in named_pairs(other).items():
                for k in sorted(set(range(len(means[layer]))) - set(plan.keep[layer].tolist())):
                    group, position = divmod(k, pair.rank)
                    rows = slice(group * pair.out_per_group, (group + 1) * pair.out_per_group)
                    column = pair.scaling.weight[rows, position].flatten()
                    pair.scaling.bias[rows] += pair.scale[k] * means[layer][k] * column
    masked(other, plan.keep)
    return net, other


# Oracle 10
@pytest.mark.parametrize("with_means", [False, True], ids=["plain", "mean_to_bias"])
@pytest.mark.parametrize("name", NETS)
def test_removed_and_masked_models_agree(name: str, with_means: bool) -> None:
    pruned, other = pruned_and_masked(name, with_means=with_means)
    inputs = make_input(name)
    assert relative_error(pruned(inputs), other(inputs)) < 1e-12
    folded = bsdp.fold(pruned)
    assert relative_error(folded(inputs), other(inputs)) < 1e-12


@pytest.mark.parametrize("name", NETS)
def test_an_empty_plan_changes_nothing(name: str) -> None:
    net = decomposed(make_net(name))
    randomize_scales(net)
    plan = bsdp.select(
        {n: torch.rand(p.scaling.delta.numel()) for n, p in named_pairs(net).items()},
        bsdp.measure_cost(net),
        budget=1e9,
    )
    before = snapshot(net)
    bsdp.prune(net, plan, means=feature_means(net, make_input(name)))
    assert_same_state(net, before)


LAYERS_ALONE = {
    "conv": (lambda: nn.Conv2d(4, 8, 3, padding=1), (6, 4, 7, 7)),
    "no_bias": (lambda: nn.Conv2d(4, 8, 3, stride=2, bias=False), (6, 4, 7, 7)),
    "groups": (lambda: nn.Conv2d(4, 12, 3, groups=2, padding=1, padding_mode="reflect"), (6, 4, 7, 7)),
    "tokens": (lambda: nn.Linear(9, 7), (3, 5, 9)),
    "signal": (lambda: nn.Conv1d(3, 6, 4, groups=3, padding="same"), (5, 3, 9)),
}


@pytest.mark.parametrize("name", LAYERS_ALONE)
def test_mean_to_bias_keeps_the_mean_output_on_the_batch_it_was_measured_on(name: str) -> None:
    build, shape = LAYERS_ALONE[name]
    model = nn.Sequential(build().double())
    bsdp.decompose(model, include=["0"])
    randomize_scales(model)
    inputs = torch.randn(shape, dtype=torch.float64) + 2.0
    expected = model(inputs)
    plan = plan_for(model, ratio=0.6)
    without = copy.deepcopy(model)
    bsdp.prune(without, plan)
    bsdp.prune(model, plan, means=feature_means(model, inputs))
    axis = 2 if name == "tokens" else 1

    def mean_output(outputs: Tensor) -> Tensor:
        return outputs.movedim(axis, 0).flatten(1).mean(1)

    assert relative_error(mean_output(model(inputs)), mean_output(expected)) < 1e-12
    assert relative_error(mean_output(without(inputs)), mean_output(expected)) > 1e-3
    assert relative_error(model(inputs), expected) < relative_error(without(inputs), expected)


def test_mean_to_bias_shows_in_the_folded_layer_and_its_cost() -> None:
    net = decomposed(make_net("conv"))  # no biases
    plan = plan_for(net)
    cost = bsdp.measure_cost(net)
    bsdp.prune(net, plan, means=feature_means(net, make_input("conv")))
    assert all(pair.needs_bias for pair in named_pairs(net).values())
    assert sum(p.numel() for p in bsdp.fold(net).parameters()) == cost.deployed(plan.ranks)


def test_means_of_some_layers_only_are_used_there_only() -> None:
    net = decomposed(make_net("conv"))
    means = feature_means(net, make_input("conv"))
    bsdp.prune(net, plan_for(net), means={"conv1": means["conv1"]})
    assert net.conv1.needs_bias
    assert not net.conv2.needs_bias


def test_mean_contribution_of_keeping_all_is_zero_and_of_none_is_the_mean_output() -> None:
    pair = bsdp.pair_from_layer(nn.Conv2d(4, 12, 3, groups=2).double())
    nn.init.uniform_(pair.scaling.delta, -0.5, 0.5)
    inputs = torch.randn(5, 4, 6, 6, dtype=torch.float64) + 1
    features = pair.basis(inputs)
    means = features.mean((0, 2, 3)).detach()
    everything = torch.arange(12)
    assert torch.equal(mean_contribution(pair, means, everything), torch.zeros(12, dtype=torch.float64))
    expected = (pair(inputs) - pair.bias.view(1, -1, 1, 1)).mean((0, 2, 3))
    assert relative_error(mean_contribution(pair, means, everything[:0]), expected) < 1e-12
    assert means.abs().min() > 0  # the means given were not changed


@pytest.mark.parametrize("name", ["conv", "grouped", "shared"])
def test_pruning_leaves_modes_flags_and_other_parameters_alone(name: str) -> None:
    net = decomposed(make_net(name)).train()
    bsdp.freeze(net, trainable=["head"])
    flags = {n: (id(p), p.requires_grad) for n, p in net.named_parameters()}
    head = net.head.weight.detach().clone()
    bsdp.prune(net, plan_for(net))
    assert {n: (id(p), p.requires_grad) for n, p in net.named_parameters()} == flags
    assert torch.equal(net.head.weight, head)
    assert all(m.training for m in net.modules())


def test_more_cuts_can_follow_each_other_down_to_rank_one() -> None:
    net, inputs = decomposed(make_net("grouped")), make_input("grouped")
    cost = bsdp.measure_cost(net)
    errors = []
    original = net(inputs)
    for _ in range(6):
        importance = {n: p.scaling.sigma.clone() for n, p in named_pairs(net).items()}
        bsdp.prune(net, bsdp.select(importance, cost, ratio=0.5))
        errors.append(relative_error(net(inputs), original))
    assert {p.rank for p in named_pairs(net).values()} == {1}
    assert errors[0] > 0
    net(inputs).sum().backward()
    assert all(p.scaling.delta.grad is not None for p in named_pairs(net).values())


def test_a_plan_for_other_layers_or_ranks_is_refused_and_nothing_is_cut() -> None:
    net = decomposed(make_net("conv"))
    plan = plan_for(net)
    other = decomposed(make_net("residual"))
    before = snapshot(other)
    with pytest.raises(ValueError, match="`plan` names layer 'conv1', which the model does not have"):
        bsdp.prune(other, plan)
    assert_same_state(other, before)
    bsdp.prune(net, plan)
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"`plan` was made for rank \d+ of layer 'conv\d', which has rank \d+ now"):
        bsdp.prune(net, plan)
    assert_same_state(net, before)


# --- optimizers

OPTIMIZERS: dict[str, Callable[[list[dict[str, object]]], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
}


class Run:
    """A decomposed network some steps into training, with the head in a group of its own."""

    def __init__(self, name: str, optimizer: str, *, of: Run | None = None) -> None:
        self.name, self.optimizer = name, optimizer
        self.net = decomposed(make_net(name)) if of is None else copy.deepcopy(of.net)
        self.inputs = make_input(name, batch=8) if of is None else of.inputs
        bsdp.freeze(self.net, trainable=["head"])
        scales = [p.scaling.delta for p in named_pairs(self.net).values()]
        self.opt = OPTIMIZERS[optimizer]([{"params": self.net.head.parameters(), "lr": 0.1}, {"params": scales}])
        if of is None:
            for _ in range(3):
                self.step()
        else:
            self.opt.load_state_dict(copy.deepcopy(of.opt.state_dict()))

    def step(self) -> float:
        self.opt.zero_grad()
        loss = nn.functional.cross_entropy(self.net(self.inputs), torch.arange(8) % 3)
        loss.backward()
        self.opt.step()
        return loss.item()

    def twin(self) -> Run:
        """An independent copy."""
        return Run(self.name, self.optimizer, of=self)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["conv", "grouped"])
def test_the_optimizer_goes_on_with_the_momentum_of_the_survivors(name: str, optimizer: str) -> None:
    run = Run(name, optimizer)
    net, opt = run.net, run.opt
    pairs = named_pairs(net)
    before = {n: copy.deepcopy(dict(opt.state[p.scaling.delta])) for n, p in pairs.items()}
    head_state = copy.deepcopy(dict(opt.state[net.head.weight]))
    values = {n: p.scaling.delta.detach().clone() for n, p in pairs.items()}
    held = [id(p) for group in opt.param_groups for p in group["params"]]
    plan = plan_for(net)
    bsdp.prune(net, plan, optimizers=[opt])
    assert [id(p) for group in opt.param_groups for p in group["params"]] == held
    for layer, pair in pairs.items():
        keep = plan.keep[layer]
        assert torch.equal(pair.scaling.delta.detach(), values[layer][keep])
        state = opt.state[pair.scaling.delta]
        assert state.keys() == before[layer].keys()
        for key, value in state.items():
            if isinstance(value, Tensor):
                expected = before[layer][key]
                assert torch.equal(value, expected[keep] if expected.dim() == 1 else expected), key
            else:
                assert value == before[layer][key]
    for key, value in head_state.items():
        now = opt.state[net.head.weight][key]
        assert now is None if value is None else torch.equal(now, value)
    after_cut = {n: p.scaling.delta.detach().clone() for n, p in pairs.items()}
    losses = [run.step() for _ in range(25)]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p.scaling.delta, after_cut[n]) for n, p in pairs.items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_after_a_cut_are_those_of_the_masked_run(optimizer: str) -> None:
    run = Run("residual", optimizer)
    twin = run.twin()
    plan = plan_for(run.net)
    bsdp.prune(run.net, plan, optimizers=[run.opt])
    masked(twin.net, plan.keep)
    twins = named_pairs(twin.net)
    for _ in range(4):
        run.step()
        twin.step()
        masked(twin.net, plan.keep)  # the dead must stay dead
    for name, pair in named_pairs(run.net).items():
        survivors = twins[name].scaling.delta[plan.keep[name]]
        assert torch.allclose(pair.scaling.delta, survivors, rtol=0, atol=1e-10)


def test_several_optimizers_and_one_that_holds_nothing_of_ours() -> None:
    run = Run("conv", "adam")
    net, opt = run.net, run.opt
    foreign = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1, momentum=0.9)
    bsdp.prune(net, plan_for(net), optimizers=[foreign, opt])
    assert len(foreign.state) == 0
    run.step()


def test_an_optimizer_that_has_not_stepped_yet_needs_nothing() -> None:
    net = decomposed(make_net("conv"))
    opt = torch.optim.Adam([p.scaling.delta for p in named_pairs(net).values()])
    bsdp.prune(net, plan_for(net), optimizers=[opt])
    assert len(opt.state) == 0
    net(make_input("conv")).sum().backward()
    opt.step()


def test_scalars_stay_and_factored_state_is_cut_along_its_axes() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    opt = torch.optim.Adam([parameter])
    opt.state[parameter] = {
        "step": torch.tensor(7.0),
        "exp_avg": torch.arange(15.0).view(5, 3),
        "row": torch.arange(5.0)[:, None],
        "column": torch.arange(3.0)[None],
        "note": 3,
    }
    cut_state([opt], parameter, torch.Size([5, 3]), lambda value: value.view(5, 3)[[1, 4]])
    state = opt.state[parameter]
    assert state["exp_avg"].tolist() == [[3.0, 4.0, 5.0], [12.0, 13.0, 14.0]]
    assert (state["row"].tolist(), state["column"].tolist()) == ([[1.0], [4.0]], [[0.0, 1.0, 2.0]])
    assert (float(state["step"]), state["note"]) == (7.0, 3)


@pytest.mark.parametrize("other", [torch.zeros(5, 5), [torch.zeros(5, 5)]], ids=["tensor", "list"])
def test_state_of_other_shapes_is_dropped(other: object) -> None:
    parameter, bystander = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    opt = torch.optim.Adam([parameter, bystander])
    opt.state[parameter] = {"exp_avg": torch.arange(5.0), "factors": other}
    opt.state[bystander] = {"exp_avg": torch.zeros(2)}
    cut_state([opt], parameter, torch.Size([5]), lambda value: value[[1, 4]])
    assert list(opt.state) == [bystander]


def test_the_memory_format_stays() -> None:
    net = make_net("conv")
    net = decomposed(net.to(memory_format=torch.channels_last)).requires_grad_(True)  # type: ignore[call-overload]
    opt = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    net(make_input("conv")).sum().backward()
    opt.step()
    bsdp.prune(net, plan_for(net), optimizers=[opt])
    for pair in named_pairs(net).values():
        weight = pair.basis.weight
        assert isinstance(weight, nn.Parameter)
        assert is_channels_last(weight) and is_channels_last(opt.state[weight]["momentum_buffer"])
    folded = [p for p in bsdp.fold(net).parameters() if p.dim() == 4 and p.shape[-1] > 1]
    assert folded and all(is_channels_last(p) for p in folded)


def test_stale_state_is_dropped_and_fitting_state_kept() -> None:
    run = Run("conv", "adam")
    net, opt = run.net, run.opt
    fitting = opt.state[net.head.weight]
    net.conv1.keep(torch.tensor([0, 1]))
    drop_stale_state([opt])
    assert net.conv1.scaling.delta not in opt.state
    assert net.conv2.scaling.delta in opt.state
    assert opt.state[net.head.weight] is fitting
    run.step()


def test_data_that_were_cut_are_really_gone() -> None:
    net = decomposed(make_net("conv"))
    before = sum(p.numel() for p in net.parameters())
    bsdp.prune(net, plan_for(net))
    assert sum(p.numel() for p in net.parameters()) < before
    for pair in named_pairs(net).values():
        for tensor in (*pair.parameters(), pair.scaling.sigma):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
