"""Scores of single examples against a slow loop with one backward pass for each of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp.importance import NoScoresError, ScoreAccumulator
from bsdp.layers import named_pairs
from tests.helpers.cases import CASES_BY_NAME
from tests.helpers.compare import decomposed, randomize_scales, relative_error
from tests.helpers.nets import NETS, make_input, make_net

Loss = Callable[[Tensor], Tensor]


def scored(net: nn.Module, **options: object) -> nn.Module:
    net = decomposed(net.double(), **options)
    randomize_scales(net)
    return net


def loss_of(net: nn.Module) -> Loss:
    return lambda inputs: net(inputs).square().mean()


def slow(net: nn.Module, inputs: Tensor, loss: Loss | None = None) -> dict[str, Tensor]:
    """Mean over the examples of ``(s dL_n/ds)^2``."""
    pairs, loss = named_pairs(net), loss or loss_of(net)
    terms: dict[str, list[Tensor]] = {name: [] for name in pairs}
    for example in inputs:
        net.zero_grad()
        loss(example[None]).backward()
        for name, pair in pairs.items():
            assert pair.scaling.delta.grad is not None
            terms[name].append((pair.scale * pair.scaling.delta.grad).detach().square())
    net.zero_grad()
    return {name: torch.stack(values).mean(0) for name, values in terms.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-5, name


@pytest.mark.parametrize("name", NETS)
def test_every_example_of_a_network_counts_as_if_it_were_alone(name: str) -> None:
    net, batches = scored(make_net(name)), [make_input(name, batch=n) for n in (3, 1, 4)]
    scores = ScoreAccumulator(named_pairs(net), importance="fisher", model=net)
    for batch in batches:
        with scores.collecting():
            loss_of(net)(batch).backward()
        scores.update()
    assert scores.steps == 8 and scores.unit == "examples"
    assert_same(scores.compute(), slow(net, torch.cat(batches)))


@pytest.mark.parametrize("name", ["groups", "conv3d_groups", "transposed_groups", "transposed1d", "linear_tokens"])
@pytest.mark.parametrize("model", [False, True])
def test_every_kind_of_layer(name: str, model: bool) -> None:
    case = CASES_BY_NAME[name]
    net = scored(nn.Sequential(case.build(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)), include=["0"])
    inputs = torch.randn(3, *case.input_shape[1:], dtype=torch.float64)
    net[3].double()
    net(inputs)
    scores = ScoreAccumulator(named_pairs(net), importance="fisher", model=net if model else None)
    with scores.collecting():
        loss_of(net)(inputs).backward()
    assert_same(scores.compute(), slow(net, inputs))


def test_one_backward_pass_is_all_it_takes_and_gradients_are_as_ever() -> None:
    net, inputs = scored(make_net("residual")), make_input("residual")
    loss_of(net)(inputs).backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    scores = ScoreAccumulator(named_pairs(net), importance="fisher", model=net)
    with scores.collecting():
        loss_of(net)(inputs).backward()
    for name, parameter in net.named_parameters():
        if name in expected:
            assert torch.equal(parameter.grad, expected[name])
    hooks = [m._forward_pre_hooks for m in net.modules()]
    assert not any(hooks)


def test_accumulated_gradients_and_scaled_losses_give_the_same_terms() -> None:
    net, inputs = scored(make_net("conv")), make_input("conv", batch=6)
    expected = slow(net, inputs)
    parted = ScoreAccumulator(named_pairs(net), importance="fisher", model=net)
    for part in inputs.split(2):
        with parted.collecting(scale=1024.0, parts=3):
            (1024.0 * loss_of(net)(part) / 3).backward()
    assert_same(parted.compute(), expected)
    together = ScoreAccumulator(named_pairs(net), importance="fisher", model=net)
    with together.collecting(parts=3):
        for part in inputs.split(2):
            (loss_of(net)(part) / 3).backward()
    assert_same(together.compute(), expected)


def test_two_passes_of_one_batch_hold_different_examples() -> None:
    net, inputs = scored(make_net("conv")), make_input("conv", batch=4)
    scores = ScoreAccumulator(named_pairs(net), importance="fisher", model=net)
    with scores.collecting():
        (loss_of(net)(inputs[:2]) + loss_of(net)(inputs[2:])).backward()
    assert scores.steps == 4
    assert_same(scores.compute(), slow(net, inputs))


class Windows(nn.Module):
    """Cuts each example into two windows, which the layer sees as examples of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 6)
        self.outside = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        windows = torch.tanh(self.inside(tokens.reshape(2 * len(tokens), -1, 6)))
        return self.outside(windows.reshape(len(tokens), -1, 6)).mean(1)


@pytest.mark.parametrize("model", [False, True])
def test_windows_of_one_example_belong_together(model: bool) -> None:
    net, inputs = scored(Windows(), include=["*"]), torch.randn(3, 4, 6, dtype=torch.float64)
    scores = ScoreAccumulator(named_pairs(net), importance="fisher", model=net if model else None)
    with scores.collecting():
        loss_of(net)(inputs).backward()
    assert scores.steps == 3
    assert_same(scores.compute(), slow(net, inputs))


class TokensFirst(nn.Module):
    """Runs one layer on ``[tokens, batch, features]``."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 6)
        self.outside = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.outside(torch.tanh(self.inside(tokens.transpose(0, 1))).mean(0))


def test_a_layer_without_the_batch_on_its_first_axis_is_refused() -> None:
    net = scored(TokensFirst(), include=["*"])
    scores = ScoreAccumulator(named_pairs(net), importance="fisher", model=net)
    with pytest.raises(ValueError, match=r"batch on the first axis .* layer 'inside' has 5 rows"), scores.collecting():
        loss_of(net)(torch.randn(3, 5, 6, dtype=torch.float64)).backward()


def test_a_batch_with_nan_counts_for_nothing() -> None:
    net, inputs = scored(make_net("conv")), make_input("conv", batch=4)
    scores = ScoreAccumulator(named_pairs(net), importance="fisher", model=net)
    for factor in (1.0, float("nan")):
        with scores.collecting():
            loss_of(net)(inputs * factor).backward()
    assert scores.steps == 4
    assert_same(scores.compute(), slow(net, inputs))


def test_nothing_is_seen_without_a_backward_pass_or_after_an_error() -> None:
    net, inputs = scored(make_net("conv")), make_input("conv")
    scores = ScoreAccumulator(named_pairs(net), importance="fisher", model=net)
    with torch.no_grad(), scores.collecting():
        net(inputs)
    with pytest.raises(RuntimeError, match="stop"), scores.collecting():
        loss_of(net)(inputs).backward()
        raise RuntimeError("stop")
    with scores.collecting():
        pass
    assert scores.steps == 0 and not any(module._forward_pre_hooks for module in net.modules())
    with pytest.raises(NoScoresError, match="keep `collecting` open"):
        scores.compute()


def test_half_precision_is_summed_in_float32() -> None:
    net = scored(make_net("conv")).to(torch.bfloat16)
    scores = ScoreAccumulator(named_pairs(net), importance="fisher", model=net)
    with scores.collecting():
        loss_of(net)(make_input("conv", dtype=torch.bfloat16)).backward()
    assert all(value.dtype == torch.float32 and value.any() for value in scores.compute().values())


def test_a_pruner_takes_its_scores_from_the_batches_it_watches() -> None:
    net, inputs = scored(make_net("conv")), make_input("conv", batch=5)
    settings = bsdp.PruningSettings(target=0.3, rounds=1, tolerance=None, importance="fisher", mean_to_bias=False)
    pruner = bsdp.IterativePruner(net, settings, bsdp.measure_cost(net))
    with pruner.collecting(2.0, 4):
        (2.0 * loss_of(net)(inputs) / 4).backward()
    loss_of(net)(inputs).backward()
    pruner.update()
    assert pruner.scores.steps == 5
    assert_same(pruner.scores.compute(), slow(net, inputs))
    assert pruner.cut(1) and pruner.scores.steps == 0
