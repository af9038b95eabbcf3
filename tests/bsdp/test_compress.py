"""Compression in one call, without training: what it reaches, what it leaves alone, what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp import compression_choice, compression_cutting
from bsdp.calibration_data import collect_examples
from bsdp.compression_steps import basis_scores
from bsdp.joint_moments import collect_joint_moments, survey_outputs
from bsdp.output_scores import example_scores, output_root_products


def network(classes: int = 5) -> nn.Sequential:
    """Convolutions with and without bias and groups, batch norms that do something, a linear layer and a head."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True)),
        *(nn.Conv2d(12, 12, 3, groups=2), nn.BatchNorm2d(12), nn.ReLU(inplace=True)),
        *(nn.Conv2d(12, 16, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, classes)),
    )
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.running_mean, -0.2, 0.2)
        nn.init.uniform_(norm.running_var, 0.2, 0.5)
    return model.eval()


def images(count: int = 60, seed: int = 1) -> Tensor:
    """Smooth ones, so that layers have something to save."""
    small = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(small, size=8, mode="bilinear") * 2.0


def batches(data: Tensor, size: int = 20) -> Callable[[], Any]:
    return lambda: (((part,), None) for part in data.split(size))


def error(model: nn.Module, other: nn.Module, data: Tensor) -> float:
    with torch.no_grad():
        return float((model(data) - other.eval()(data)).square().mean())


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_the_budget_is_met_and_the_model_is_left_alone(kind: str) -> None:
    model = network().train()
    model[4].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    result = bsdp.compress(model, images(), target=0.5, target_kind=kind, passes=2)

    kept = result.stats.params_kept if kind == "params" else result.stats.macs_kept
    assert kept is not None and 0.3 < kept <= 0.5
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in before.items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.training, model[4].training) == (True, False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(isinstance(m, bsdp.BasisPair) for m in model.modules())
    assert (result.examples, result.held_out) == (40, 20)
    assert result.agreement is not None and 0.0 <= result.agreement <= 1.0
    folded = result.folded.eval()
    assert sum(p.numel() for p in folded.parameters()) == result.stats.params
    torch.testing.assert_close(folded(images(4)), result.model.eval()(images(4)))
    assert "20 held-out examples" in str(result)


def test_twice_the_same_gives_the_same() -> None:
    first, second = (bsdp.compress(network(), images(), target=0.5, passes=2) for _ in range(2))
    assert first.ranks == second.ranks
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_fitted_layers_are_closer_than_truncated_ones() -> None:
    model, data = network(), images()
    options: dict[str, Any] = {"target": 0.6, "allocation": "energy", "recalibrate": False}
    fitted = bsdp.compress(model, data, passes=9, compensate=True, **options)
    truncated = bsdp.compress(model, data, compensate=False, **options)
    plain = bsdp.compress(model, data, metric="euclidean", compensate=False, **options)
    refitted = bsdp.compress(model, data, metric="euclidean", passes=9, compensate=True, **options)

    assert fitted.ranks == truncated.ranks
    errors = [error(model, result.model, data) for result in (fitted, truncated, refitted, plain)]
    assert errors[0] < errors[1] < errors[3]
    assert errors[2] < errors[3]


def test_a_layer_is_fitted_no_worse_than_truncated_on_the_data() -> None:
    model, data = network(), images()
    options: dict[str, Any] = {"target": 0.15, "include": ["0", "3"], "allocation": "energy", "recalibrate": False}
    fitted = bsdp.compress(model, data, compensate=True, **options)
    truncated = bsdp.compress(model, data, compensate=False, **options)
    seen = collect_examples(data, images=256).seen.inputs[0]
    assert fitted.ranks["0"] < 12 and fitted.ranks["3"] < 6
    errors = [error(model[:4], result.model[:4], seen) for result in (fitted, truncated)]
    assert errors[0] < errors[1]


def test_layers_that_lose_nothing_get_no_bias() -> None:
    result = bsdp.compress(network(), images(), target=0.05, compensate=True)
    assert result.stats.params_kept <= 0.95
    full = [p for p in bsdp.named_pairs(result.model).values() if p.rank == p.full_rank and not p.had_bias]
    assert full and not any(pair.needs_bias for pair in full)


def test_at_full_rank_nothing_changes() -> None:
    model, data = network(), images()
    work = network()
    bsdp.decompose(work)
    survey, _ = basis_scores(work, batches(data), metric="activation", allocation="kl", seed=0)
    assert list(survey.moments) == ["0", "3", "6", "10"]
    assert error(model, work, data) < 1e-10


def test_joint_moments_are_those_of_the_outputs() -> None:
    model, work, data = network(), network(), images(30)
    bsdp.decompose(work)
    with torch.no_grad():
        work[0].scaling.weight.mul_(1.1)
    calls = survey_outputs(model, ["3", "10"], [(data,)]).calls
    assert calls == {"3": 1, "10": 1}
    found = collect_joint_moments(model, work, ["3", "10"], data.split(10), calls=calls)

    for name, layer in (("3", 4), ("10", 11)):
        y, z = (net[:layer](data).detach().double().movedim(1, -1).flatten(0, -2) for net in (model, work))
        groups = 2 if name == "3" else 1
        width = y.shape[1] // groups
        for g in range(groups):
            part = slice(g * width, (g + 1) * width)
            joint = torch.cov(torch.cat([y[:, part], z[:, part]], 1).mT, correction=0)
            torch.testing.assert_close(found[name].cross[g], joint[:width, width:], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found[name].covariance[g], joint[width:, width:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[name].target_mean, y.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[name].mean, z.mean(0), atol=1e-5, rtol=1e-4)
        assert found[name].count == len(y)


def test_passes_end_with_the_last_layer_that_is_asked_for() -> None:
    model, work = network(), network()
    bsdp.decompose(work)
    seen: list[str] = []
    model[12].register_forward_hook(lambda *_: seen.append("original"))
    work[12].register_forward_hook(lambda *_: seen.append("shortened"))
    collect_joint_moments(model, work, ["3"], [images(4)], calls={"3": 1})
    assert seen == []
    collect_joint_moments(model, work, ["3"], [images(4)])
    assert seen == ["original", "shortened"]


def test_scores_are_squared_gradients_of_single_examples() -> None:
    model, data = network(), images(6)
    bsdp.decompose(model)
    pairs = bsdp.named_pairs(model)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    scores = example_scores(model, pairs, [((data[:4],), labels[:4]), ((data[4:],), labels[4:])])

    wanted = {name: torch.zeros_like(score) for name, score in scores.items()}
    for image, label in zip(data.split(1), labels.split(1), strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(image), label).backward()
        for name, pair in pairs.items():
            assert pair.scaling.delta.grad is not None
            wanted[name] += pair.scaling.delta.grad.double().square() / 6
    assert scores.keys() == wanted.keys()
    assert all(torch.allclose(scores[name], wanted[name], rtol=1e-4, atol=1e-9) for name in scores)
    assert all(not p.requires_grad for p in pairs["0"].basis.parameters())
    assert model[12].weight.requires_grad


def test_signs_stand_for_the_fisher_information() -> None:
    scores = torch.tensor([[1.0, -0.5, 0.2]])
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    products = output_root_products(scores.expand(8, -1), signs)
    p = scores.softmax(1)[0]
    torch.testing.assert_close(products.mT @ products / 8, torch.diag(p) - torch.outer(p, p))


def test_outputs_that_are_no_class_scores() -> None:
    model = network()[:8]
    result = bsdp.compress(model, images(20), target=0.2)
    assert result.agreement is None and result.stats.params_kept <= 0.8


@pytest.mark.parametrize("allocation", ["kl", "energy"])
def test_one_output_per_example(allocation: str) -> None:
    """They are compared as one column is."""
    column, data = network(classes=1), images()
    flat = nn.Sequential(*column, nn.Flatten(0))
    results = [bsdp.compress(model, data, target=0.4, allocation=allocation) for model in (column, flat)]
    assert results[0].ranks == results[1].ranks
    assert results[0].output_change == results[1].output_change and results[1].agreement is None
    assert results[1].model(data).shape == (60,)


def test_a_network_with_pairs_is_shortened_further() -> None:
    first = bsdp.compress(network(), images(), target=0.3)
    second = bsdp.compress(first.model, images(), target=0.6)
    assert second.stats.params_original == first.stats.params_original
    assert second.stats.params_kept <= 0.4
    assert first.stats.params_kept > 0.5 and bsdp.describe(first.model).params == first.stats.params


def test_auto_takes_the_closest_of_four() -> None:
    found = {
        (fit, norms): bsdp.compress(network(), images(), target=0.5, compensate=fit, recalibrate=norms)
        for fit in (True, False)
        for norms in (True, False)
    }
    assert all((result.compensated, result.recalibrated) == key for key, result in found.items())
    auto = bsdp.compress(network(), images(), target=0.5)
    assert auto.output_change == min(result.output_change for result in found.values())
    assert auto.output_change == found[auto.compensated, auto.recalibrated].output_change


def fail(*_: Any, **__: Any) -> list[str]:
    raise ValueError("no statistics.")


def spoil(model: nn.Module, *_: Any, **__: Any) -> list[str]:
    nn.init.constant_(model[1].running_mean, float("nan"))  # type: ignore[index, arg-type]
    return ["1"]


@pytest.mark.parametrize("broken", [fail, spoil])
def test_auto_leaves_out_what_fails(broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression_choice, "recalibrate_batch_norms", broken)
    lines: list[str] = []
    result = bsdp.compress(network(), images(), target=0.5, progress=lines.append)
    assert not result.recalibrated and sum("left out" in line for line in lines) == 2
    with pytest.raises(ValueError, match=r"no compressed network is fit for use \((no statistics|NaN or inf)"):
        bsdp.compress(network(), images(), target=0.5, recalibrate=True)
    monkeypatch.setattr(compression_cutting, "shorten", fail)
    assert not bsdp.compress(network(), images(), target=0.5).compensated
    with pytest.raises(ValueError, match="no compressed network"):
        bsdp.compress(network(), images(), target=0.5, compensate=True)


def test_half_precision_with_tiny_inputs() -> None:
    """Their batch statistics are NaN or infinite; the running ones are none the worse."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 8, 8):
        layers += [nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).half()
    result = bsdp.compress(model, (images() * 1e-4).half(), target=0.4)
    assert not result.recalibrated and result.stats.params_kept <= 0.6


def test_outputs_of_the_original_are_checked_first() -> None:
    model = network()
    nn.init.constant_(model[12].bias, float("inf"))
    lines: list[str] = []
    with pytest.raises(ValueError, match="`model` gives NaN or infinity on `data`"):
        bsdp.compress(model, images(20), target=0.5, progress=lines.append)
    assert not lines
    with pytest.raises(ValueError, match="`model` gives no tensor of numbers"):
        bsdp.compress(nn.Sequential(*network(), nn.Softmax(1), Classes()), images(20), target=0.5)


class Classes(nn.Module):
    """The best class, which is no number to compare."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores.argmax(1)


def test_a_plan_that_misses_the_target_warns() -> None:
    """Cut for its low score per weight, the second layer gets a bias and costs more than before."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 12, 1, groups=2, bias=False), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, padding=1, groups=2, bias=False), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    )
    with pytest.warns(UserWarning, match=r"`ranking='per_cost'` leaves 30\.\d\d% of .* `target=0.704`.*'hull'"):
        result = bsdp.compress(model, images(30), target=0.704, ranking="per_cost")
    with pytest.warns(UserWarning, match=r"more than `target=0\.704` allows"):
        bsdp.compress(model, images(30), target=0.704, ranking="per_cost", tolerance=1.0, evaluate=lambda _: 1.0)
    assert result.stats.params_kept > 0.3
    assert bsdp.compress(model, images(30), target=0.704).stats.params_kept <= 0.296


@pytest.mark.parametrize("allocation", ["taylor", "energy", "kl"])
def test_every_allocation_takes_loaders_with_labels(allocation: str) -> None:
    data = [(part, torch.arange(10) % 5) for part in images().split(10)]
    lines: list[str] = []
    result = bsdp.compress(network(), iter(data), target=0.4, allocation=allocation, images=32, progress=lines.append)
    assert (result.examples, result.held_out) == (32, 16)
    assert result.stats.params_kept <= 0.6 and any("scoring" in line for line in lines)


def test_few_positions_warn_and_stay_finite() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 3))
    with pytest.warns(UserWarning, match="give more images"):
        result = bsdp.compress(model, torch.randn(5, 20), target=0.4)
    assert result.held_out == 0 and result.examples == 5
    assert all(p.isfinite().all() for p in result.model.parameters())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data": []}, "`data` has 0 examples"),
        ({"data": images(1)}, "`data` has 1 examples"),
        ({"data": images(20) * float("nan")}, "NaN or infinity"),
        ({"data": [images(4), images(4)[:, :, :6]]}, "different shapes"),
        ({"data": images(20).to(torch.uint8)}, r"cannot take the inputs of `data` .* of uint8 for one example"),
        ({"data": images(20)[:, :1]}, r"cannot take the inputs of `data` \(\[1, 1,"),
        ({"data": [(images(4), torch.zeros(3))]}, "equally many examples"),
        ({"data": [(images(20), torch.zeros(20, 1).long())]}, r"second tensor .* whole numbers of shape \[N\]"),
        ({"data": [(images(20), torch.zeros(20))]}, r"second tensor .* whole numbers of shape \[N\]"),
        ({"allocation": "taylor"}, "needs labels"),
        ({"allocation": "taylor", "data": [(images(20), torch.arange(20))]}, "`data`: labels go from 0 to 1\\d"),
        ({"target": 0.99}, "`target=0.99` is out of reach"),
        ({"target": 50}, "`target` is a share"),
        ({"target_kind": "bases"}, "`target_kind`"),
        ({"metric": "kfac"}, "`metric`"),
        ({"allocation": "sigma"}, "`allocation`"),
        ({"recalibrate": "maybe"}, "`recalibrate`"),
        ({"compensate": "maybe"}, "`compensate`"),
        ({"passes": 0}, "`passes`"),
        ({"include": ["99"]}, "`include`"),
        ({"exclude": ["0", "3", "6", "10"]}, "no layer that can be decomposed"),
    ],
)
def test_refusals(changes: dict[str, Any], match: str) -> None:
    model = network().train()
    arguments: dict[str, Any] = {"data": images(20), "target": 0.5, **changes}
    with pytest.raises(ValueError, match=match):
        bsdp.compress(model, arguments.pop("data"), **arguments)
    assert model.training


def test_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match="call it outside of `torch"):
        bsdp.compress(network(), images(20), target=0.5)


@pytest.mark.parametrize("data", [3, "folder", {"a": images(4)}, [{"a": images(4)}], [("a", "b")]])
def test_data_of_other_forms_are_refused(data: Any) -> None:
    with pytest.raises(TypeError, match="`data`"):
        bsdp.compress(network(), data, target=0.5)
