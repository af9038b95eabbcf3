"""`DoublePruner` in plain Python: which cut it takes, what a trial leaves behind, and how cuts follow each other."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

import bsdp
from bsdp.double_pruner import ORDERS, DoublePruner, DoublePruningSettings, output_change
from bsdp.plain_layers import weight_of
from bsdp.widths import widths_of
from tests.helpers.channel_runs import ResidualNet
from tests.helpers.marks import slow_but
from tests.helpers.resuming import differences

EXAMPLE = torch.zeros(1, 1, 8, 8)


class Chain(nn.Module):
    """Two convolutions of full rank and a head; input ``[batch, 1, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv2(self.conv1(self.stem(images).relu()).relu()).relu().mean((2, 3)))


def make(net: nn.Module | None = None, *, images: Tensor | None = None, **settings: Any) -> tuple[nn.Module, Any]:
    """A decomposed network and its pruner, with two steps of scores and momentum."""
    network = ResidualNet() if net is None else net
    bsdp.decompose(network)
    images = torch.randn(16, 1, 8, 8) if images is None else images
    options = {"target": 0.4, "rounds": 4, "schedule": "constant", "tolerance": None, **settings}

    def probe() -> Tensor:
        with torch.no_grad():
            return network.eval()(images)

    pruner = DoublePruner(network, DoublePruningSettings(**options), EXAMPLE, probe=probe)
    learn(network, pruner)
    return network, pruner


def learn(network: nn.Module, pruner: DoublePruner, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Two steps; without an optimizer, of scores only."""
    for _ in range(2):
        network.zero_grad()
        with pruner.collecting():
            images = torch.randn(16, 1, 8, 8)
            nn.functional.cross_entropy(network.train()(images), torch.randint(4, (16,))).backward()
        pruner.update()
        if optimizer is not None:
            optimizer.step()


def train(network: nn.Module, pruner: DoublePruner) -> list[str]:
    """All rounds; gives what each of them cut."""
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    for epoch in range(1, 1 + pruner.settings.rounds):
        assert pruner.cut(epoch, optimizers=[optimizer])
        learn(network, pruner, optimizer)
    return [entry.stage for entry in pruner.record.rounds[1:]]


@pytest.mark.parametrize(
    ("order", "split", "expected"),
    [
        ("basis_then_channel", 0.5, ["basis", "basis", "channel", "channel"]),
        ("channel_then_basis", 0.5, ["channel", "channel", "basis", "basis"]),
        ("alternate", 0.5, ["basis", "channel", "channel", "basis"]),
        ("alternate", 0.75, ["basis", "channel", "basis", "basis"]),
        ("alternate", 0.0, ["channel"] * 4),
        ("basis_then_channel", 1.0, ["basis"] * 4),
    ],
)
def test_given_split(order: str, split: float, expected: list[str]) -> None:
    network, pruner = make(order=order, split=split)
    assert train(network, pruner) == expected
    last = pruner.record.rounds[-1]
    assert last.params <= 0.6 * pruner.record.cost.original()
    assert last.params == sum(p.numel() for p in bsdp.fold(network).parameters())


@pytest.mark.parametrize(
    ("order", "rounds", "expected"),
    [
        ("basis_then_channel", 1, ["basis and channel"]),
        ("basis_then_channel", 2, ["basis and channel", "channel"]),
        ("channel_then_basis", 2, ["channel", "basis"]),
    ],
)
def test_a_given_split_is_kept_when_a_round_crosses_it(order: str, rounds: int, expected: list[str]) -> None:
    network, pruner = make(order=order, split=0.5, rounds=rounds, schedule="cubic")
    assert train(network, pruner) == expected
    assert pruner.record.rounds[-1].params <= 0.6 * pruner.record.cost.original()
    assert pruner.record.rounds[-1].bases < pruner.record.rounds[0].bases
    assert sum(pruner.record.rounds[-1].channels.values()) < sum(pruner.record.rounds[0].channels.values())


def free(kind: str) -> nn.Module:
    """Half of the channels, or more than half of the bases, change nothing when they go."""
    net = Chain()
    with torch.no_grad():
        if kind == "channel":  # made at full rank, but nobody reads them
            net.conv1.weight[:, 4:] = 0
            net.conv2.weight[:, 8:] = 0
            net.head.weight[:, 6:] = 0
        else:
            for conv in (net.conv1, net.conv2):
                rows = torch.randn(conv.out_channels, 3) @ torch.randn(3, conv.weight[0].numel())
                conv.weight.copy_(rows.view_as(conv.weight) * 0.1)
    return net


@pytest.mark.parametrize("order", ["alternate", "basis_then_channel", "channel_then_basis"])
@pytest.mark.parametrize("kind", ["channel", "basis"])
def test_automatic_split_finds_what_is_free(kind: str, order: str) -> None:
    network, pruner = make(free(kind), order=order, rounds=1, target=0.35, mean_to_bias=False)
    images = torch.randn(8, 1, 8, 8)
    before = network(images)
    assert pruner.cut(1)
    assert pruner.record.rounds[1].stage == kind
    other = "basis" if kind == "channel" else "channel"
    assert pruner.changes[kind] < 1e-9 < 1e-7 < pruner.changes[other]
    assert len(pruner.changes) == (3 if order == "alternate" else 2)
    torch.testing.assert_close(network(images), before, rtol=1e-3, atol=1e-4)
    assert pruner.record.rounds[1].params <= 0.65 * pruner.record.cost.original()


@pytest.mark.parametrize("criterion", ["taylor_2019", "random"])
def test_a_trial_leaves_no_trace(criterion: str) -> None:
    network, pruner = make(criterion=criterion)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad])
    optimizer.step()
    gradients = {name: p.grad for name, p in network.named_parameters()}

    def everything() -> Any:
        return {
            "weights": {key: value.clone() for key, value in network.state_dict().items()},
            "shapes": {key: tuple(value.shape) for key, value in network.named_parameters()},
            "structure": bsdp.structure_of(network),
            "gradients": {key: None if g is None else g.clone() for key, g in gradients.items()},
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "pruner": {k: v for k, v in pruner.state_dict().items() if criterion != "random" or k != "stages"},
            "bases": pruner.basis.state_dict(),
        }

    before = copy.deepcopy(everything())
    tried = pruner.try_cuts(0.7 * pruner.record.cost.original())
    assert all(0 < change < 10 for change in tried.values()), tried
    assert differences(before, everything()) == []
    assert all(p.grad is gradients[name] for name, p in network.named_parameters())
    again = pruner.try_cuts(0.7 * pruner.record.cost.original())
    assert again == tried
    network.zero_grad()
    network(torch.randn(2, 1, 8, 8)).sum().backward()  # gradients arrive at the same parameters
    optimizer.step()


def test_the_cut_that_was_tried_is_the_one_that_is_made() -> None:
    _, pruner = make(criterion="random", order="alternate")
    before = pruner.probe()
    assert pruner.cut(1)
    stage = pruner.record.rounds[1].stage
    assert pruner.changes[stage] == min(pruner.changes.values()) == output_change(before, pruner.probe())


def test_a_failing_trial_leaves_the_model_whole() -> None:
    network, pruner = make()
    state, inner, calls = {k: v.clone() for k, v in network.state_dict().items()}, pruner.probe, []

    def probe() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no images")
        return inner()  # type: ignore[no-any-return]

    pruner.probe = probe
    with pytest.raises(RuntimeError, match="no images"):
        pruner.cut(1)
    assert differences(state, dict(network.state_dict())) == []


def test_output_change() -> None:
    before, after = torch.randn(5, 3), torch.randn(5, 3)
    expected = kl_divergence(Categorical(logits=before.double()), Categorical(logits=after.double())).mean()
    assert output_change(before, after) == pytest.approx(float(expected), rel=1e-9)
    assert output_change(before, before + 3.0) == pytest.approx(0.0, abs=1e-12)  # the same probabilities
    maps = torch.ones(2, 3, 4, 4)
    assert output_change(maps, 1.5 * maps) == pytest.approx(0.25)
    assert output_change(torch.full((4, 1), 2.0), torch.full((4, 1), 3.0)) == pytest.approx(0.25)
    assert output_change((maps, before), (1.5 * maps, 1.1 * before)) == pytest.approx(0.26)
    with pytest.raises(ValueError, match="other shapes after a cut"):
        output_change(before, before[:4])


def test_orders_move_on_once_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    _, pruner = make(order="basis_then_channel")
    answers = iter([{"basis": 1.0, "channel": 2.0}, {"basis": 2.0, "channel": 1.0}])
    monkeypatch.setattr(pruner, "try_cuts", lambda budget: next(answers))
    assert [pruner._choose(1.0) for _ in range(4)] == ["basis", "channel", "channel", "channel"]
    _, other = make(order="channel_then_basis")
    answers = iter([{"basis": float("inf"), "channel": float("inf")}, {"basis": 2.0, "channel": 3.0}])
    monkeypatch.setattr(other, "try_cuts", lambda budget: next(answers))
    assert [other._choose(1.0) for _ in range(3)] == ["channel", "basis", "basis"]


def test_channels_go_on_where_bases_cannot() -> None:
    _, pruner = make(max_layer_ratio=0.1, rounds=1, order="basis_then_channel", split=1.0)
    assert pruner.cut(1)
    assert pruner.record.rounds[1].stage == "basis and channel"
    assert pruner.record.rounds[1].params <= 0.6 * pruner.record.cost.original()


def test_a_cut_of_channels_that_cannot_reach_the_budget() -> None:
    _, pruner = make(max_group_ratio=0.1, rounds=1)
    assert pruner.cut(1)
    assert pruner.changes["channel"] == float("inf") and pruner.record.rounds[1].stage == "basis"


@pytest.mark.parametrize("split", ["auto", 0.5])
def test_a_round_without_scores_is_skipped(split: Any) -> None:
    network, pruner = make(split=split, order="channel_then_basis")
    for stage in pruner.stages.values():
        stage.reset()
    state = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.warns(UserWarning, match="pruning round 1 is skipped: no finite gradient"):
        assert not pruner.cut(1)
    assert differences(state, dict(network.state_dict())) == []
    assert len(pruner.record.rounds) == 1 and pruner.stage == "channel"
    learn(network, pruner)
    assert pruner.cut(2)


def test_bases_go_where_channels_have_no_scores() -> None:
    network, pruner = make(max_layer_ratio=0.1, order="basis_then_channel", split=1.0)
    pruner.channel.reset()
    ranks = sum(pruner.ranks.values())
    assert pruner.cut(1)  # short of its budget, but what was cut is on record
    assert pruner.record.rounds[1].stage == "basis" and sum(pruner.record.rounds[1].ranks.values()) < ranks
    learn(network, pruner)
    assert pruner.cut(2) and pruner.record.rounds[2].stage == "basis and channel"


def test_bases_are_orthonormal_again_after_a_cut_of_channels() -> None:
    network, pruner = make(order="channel_then_basis", split=0.5, rounds=2)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    learn(network, pruner, optimizer)
    for epoch in (1, 2):
        images = torch.randn(4, 1, 8, 8)
        assert pruner.cut(epoch, optimizers=[optimizer])
        plain = bsdp.fold(network)
        torch.testing.assert_close(plain.eval()(images), network.eval()(images), rtol=1e-4, atol=1e-5)
        for name, pair in bsdp.named_pairs(network).items():
            rows = weight_of(pair.basis).flatten(1)
            torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)
            if epoch == 1 and name in widths_of(network):
                assert not pair.scaling.delta.any() and pair.scaling.delta not in optimizer.state
        learn(network, pruner, optimizer)
    layers = {row["name"]: row for row in pruner.record.rounds[-1].layers}
    for name, pair in bsdp.named_pairs(network).items():
        assert (layers[name]["rank"], layers[name]["channels"]) == (pair.rank, pair.out_channels)
        assert layers[name]["kind"] in ("pair", "fused")
        assert layers[name]["channels_original"] == {"stem": 12, "conv1": 16, "conv2": 12}[name]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "order": ({"order": "both"}, "`order` must be one of"),
    "split": ({"split": 1.5}, r"`split` must be 'auto' or a share in \[0, 1\], got 1.5"),
    "word": ({"split": "half"}, "`split` must be 'auto'"),
    "factors": ({"criterion": "transtailor"}, "trains factors of its own"),
    "channels": ({"target_kind": "channels"}, "`target_kind` must be one of"),
    "target": ({"target": 0.99, "min_channels": 8}, "`target=0.99` is out of reach: with the least ranks and channels"),
    "rank": ({"target": 0.7, "split": 1.0, "min_rank": 8}, r"by cuts of basis, .* at most with `min_rank=8`\. Use"),
    "share": ({"target": 0.8, "split": 0.0, "min_channels": 8}, r"`split=0.0` of `target=0.8` cannot be met"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


REACHED = [(kind, order) for kind in ("params", "macs") for order in ORDERS]


@pytest.mark.parametrize(("kind", "order"), slow_but(REACHED[::2], REACHED))
def test_no_target_that_can_be_reached_is_refused(kind: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut of channels lowers the ranks, too, so that few rounds go further than rank by rank."""
    bounds = {"rounds": 2, "max_layer_ratio": 0.3, "max_group_ratio": 0.9, "min_channels": 4, "mean_to_bias": False}
    free = {"criterion": "l2", "importance": "magnitude", "warmup_epochs": 0, "schedule": "cubic"}
    with monkeypatch.context() as patch:
        patch.setattr(DoublePruner, "check_target", lambda _: None)
        _, pruner = make(target=0.9, target_kind=kind, order=order, **bounds, **free)
    limit = pruner.largest_share(rounds=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the last round did not reach the budget
        for epoch in range(2):
            pruner.cut(epoch)
    share = pruner.record.kept(pruner.record.rounds[-1], kind)
    assert 1 - share <= limit + 1e-9


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"no decomposed layer: call `bsdp.decompose` first"):
        DoublePruner(ResidualNet(), DoublePruningSettings(), EXAMPLE)
    _, pruner = make()
    pruner.probe = None
    with pytest.raises(ValueError, match="`split='auto'` needs `probe`"):
        pruner.cut(1)
