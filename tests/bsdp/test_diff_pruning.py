"""Sparse deltas over frozen weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bsdp
from bsdp.diff_pruning import SparseDelta, expected_l0, size_of, strongest_entries
from tests.helpers.hostile import unchanged
from tests.helpers.nets import NETS, ConvNet, GroupedNet, SharedNet, TokenNet, make_input, make_net


def with_random_deltas(model: nn.Module, *, exclude: tuple[str, ...] = ("head",)) -> dict[str, SparseDelta]:
    """Deltas as if they had been trained."""
    deltas = bsdp.attach_deltas(model, exclude=exclude)
    generator = torch.Generator().manual_seed(7)
    for delta in deltas.values():
        with torch.no_grad():
            delta.value.copy_(0.1 * torch.randn(delta.value.shape, generator=generator))
            delta.alpha.copy_(2.0 * torch.randn(delta.value.shape, generator=generator))
    return deltas


@pytest.mark.parametrize("name", NETS)
def test_a_new_delta_changes_nothing_and_goes_without_a_trace(name: str) -> None:
    model, inputs = make_net(name), make_input(name)
    model.requires_grad_(False)
    outputs = model(inputs)
    with unchanged(model):
        deltas = with_random_deltas(model)
        assert not torch.equal(model(inputs), outputs)
        bsdp.detach_deltas(model)
        bsdp.attach_deltas(model, exclude=["head"])
        assert torch.equal(model(inputs), outputs)
        bsdp.detach_deltas(model)
    assert deltas and not any(name.startswith("head") for name in deltas)


def test_gradients_reach_values_and_gates_but_not_the_backbone() -> None:
    model = ConvNet(bias=True)
    deltas = with_random_deltas(model)
    for delta in deltas.values():
        delta.draw(torch.Generator().manual_seed(0))
        delta.noise[1] = torch.tensor(0.01)  # the gate of the whole parameter is neither shut nor fully open
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert model.conv1.parametrizations.weight.original.grad is None
    assert model.head.weight.grad is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in deltas["conv1.weight"].parameters())


def test_the_gates_of_a_step_are_those_drawn_and_evaluation_has_no_noise() -> None:
    model = ConvNet()
    deltas = with_random_deltas(model)
    delta = deltas["conv1.weight"]
    quiet = delta.delta()
    delta.draw(torch.Generator().manual_seed(0))
    original = model.conv1.parametrizations.weight.original
    assert torch.equal(model.conv1.weight, model.conv1.weight)
    assert torch.equal(model.conv1.weight, original + delta.delta(noisy=True))
    assert not torch.equal(delta.delta(noisy=True), quiet)
    model.eval()
    assert torch.equal(model.conv1.weight, original + quiet)


def test_structured_gates_multiply_and_their_probabilities_too() -> None:
    model = ConvNet(bias=True)
    deltas = with_random_deltas(model)
    for delta in deltas.values():
        with torch.no_grad():
            delta.group_alpha.fill_(0.5)  # type: ignore[union-attr]
    chances = [torch.sigmoid(d.alpha) * torch.sigmoid(torch.tensor(0.5)) for d in deltas.values()]
    torch.testing.assert_close(expected_l0(deltas), torch.cat([c.flatten() for c in chances]).sum())
    delta = deltas["conv2.weight"]
    gates = (3 * torch.sigmoid(delta.alpha) - 1.5).clamp(0, 1) * (3 * torch.sigmoid(torch.tensor(0.5)) - 1.5)
    torch.testing.assert_close(delta.delta(), delta.value * gates)
    plain = bsdp.attach_deltas(ConvNet(), structured=False)
    assert all(d.group_alpha is None and len(d.alphas()) == 1 for d in plain.values())


@pytest.mark.parametrize("density", [0.0001, 0.013, 0.5, 0.999])
def test_projection_keeps_the_exact_number_of_the_largest(density: float) -> None:
    model = ConvNet(bias=True)
    deltas = with_random_deltas(model)
    before = torch.cat([d.delta().detach().flatten() for d in deltas.values()])
    count = max(1, round(density * before.numel()))
    assert bsdp.project_deltas(deltas, density) == count
    masks = torch.cat([d.mask.flatten() for d in deltas.values()])  # type: ignore[union-attr]
    after = torch.cat([d.delta().detach().flatten() for d in deltas.values()])
    assert int(masks.sum()) == int(expected_l0(deltas)) == count
    assert torch.equal(after, torch.where(masks, before, 0.0))
    assert before[masks].abs().min() >= before[~masks].abs().max()


def test_ties_go_to_the_first_and_zeros_fill_up() -> None:
    deltas = bsdp.attach_deltas(nn.Sequential(nn.Linear(4, 5)), structured=False)
    assert strongest_entries(deltas, 0.2).tolist() == [0, 1, 2, 3, 4]


def test_after_the_projection_only_the_mask_trains() -> None:
    model = ConvNet()
    deltas = with_random_deltas(model)
    bsdp.project_deltas(deltas, 0.1)
    optimizer = torch.optim.AdamW([d.value for d in deltas.values()], lr=0.1, weight_decay=0.1)
    delta = deltas["conv2.weight"]
    before = delta.delta().detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    assert delta.mask is not None
    assert torch.equal((delta.delta() != 0), delta.mask)
    assert not torch.equal(delta.delta(), before)


def test_copies_live_on_their_own_and_fold_is_plain() -> None:
    model = ConvNet().eval()
    bsdp.project_deltas(with_random_deltas(model), 0.1)
    images = torch.randn(2, 3, 8, 8)
    outputs = model(images)
    folded, twin = bsdp.fold(model), copy.deepcopy(model)
    bsdp.detach_deltas(twin)
    assert torch.equal(folded(images), outputs) and torch.equal(model(images), outputs)
    assert type(folded.conv1) is nn.Conv2d and folded.state_dict().keys() == ConvNet().state_dict().keys()
    assert list(folded.state_dict()) == list(ConvNet().state_dict())
    assert not torch.equal(twin(images), outputs)


def test_a_state_dict_of_either_form_loads_into_either() -> None:
    model = ConvNet().eval()
    deltas = with_random_deltas(model)
    images = torch.randn(2, 3, 8, 8)
    gated, gated_output = copy.deepcopy(model.state_dict()), model(images)
    bsdp.project_deltas(deltas, 0.1)
    fixed, fixed_output = copy.deepcopy(model.state_dict()), model(images)
    model.load_state_dict(gated)
    assert torch.equal(model(images), gated_output)
    model.load_state_dict(fixed)
    assert torch.equal(model(images), fixed_output)
    assert not any(delta.alphas() for delta in deltas.values())


@pytest.mark.parametrize("fixed", [False, True])
def test_the_structure_is_rebuilt_before_the_weights_load(fixed: bool) -> None:
    model = ConvNet().eval()
    deltas = with_random_deltas(model)
    if fixed:
        bsdp.project_deltas(deltas, 0.1)
    structure, state = bsdp.structure_of(model), model.state_dict()
    images = torch.randn(2, 3, 8, 8)
    fresh, other_form = ConvNet().eval(), ConvNet().eval()
    others = with_random_deltas(other_form)
    if not fixed:
        bsdp.project_deltas(others, 0.1)
    for target in (fresh, other_form):
        bsdp.rebuild(target, structure, state_dict=state)
        target.load_state_dict(state)
        assert torch.equal(target(images), model(images))


def test_a_structure_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model = ConvNet()
    with_random_deltas(model)
    structure, state = bsdp.structure_of(model), model.state_dict()
    for change in ({"parameters": ["conv9.weight"]}, {"parameters": []}, {"low": 1.0}, {"fixed": 1}):
        fresh = ConvNet()
        with unchanged(fresh), pytest.raises(ValueError, match=r"structure|`low`"):
            bsdp.rebuild(fresh, {**structure, "deltas": {**structure["deltas"], **change}})
    broken = {**state, "head.weight": torch.zeros(4, 13)}
    fresh, attached = ConvNet(), ConvNet()
    bsdp.project_deltas(with_random_deltas(attached), 0.1)
    for target in (fresh, attached):
        with unchanged(target), pytest.raises(ValueError, match=r"head\.weight"):
            bsdp.rebuild(target, structure, state_dict=broken)
    with pytest.raises(ValueError, match="the checkpoint is of a run without"):
        bsdp.rebuild(attached, bsdp.structure_of(ConvNet()))


def test_what_gets_a_delta() -> None:
    assert "grouped.weight" in bsdp.attach_deltas(GroupedNet())
    assert list(bsdp.attach_deltas(SharedNet())) == ["first.weight", "head.weight", "head.bias"]
    assert not any(name.startswith("bn") for name in bsdp.attach_deltas(ConvNet(), norms=False))
    tied = TokenNet()
    tied.down.weight = nn.Parameter(tied.up.weight.detach().T.contiguous())
    tied.head = nn.Linear(10, 3)
    tied.extra = nn.Linear(16, 10)
    tied.extra.weight = tied.down.weight
    assert "down.weight" not in bsdp.attach_deltas(tied)
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    inputs = torch.randn(2, 5, 8)
    expected = attention.eval()(inputs)
    assert "self_attn.out_proj.weight" in bsdp.attach_deltas(attention)
    torch.testing.assert_close(attention(inputs), expected)
    assert size_of(bsdp.named_deltas(attention)) < sum(p.numel() for p in attention.parameters())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="has deltas: detach them first"):
        model = ConvNet()
        bsdp.attach_deltas(model)
        bsdp.attach_deltas(model)
    with pytest.raises(ValueError, match="is decomposed"):
        model = ConvNet()
        bsdp.decompose(model)
        bsdp.attach_deltas(model)
    with pytest.raises(ValueError, match="`exclude`"):
        bsdp.attach_deltas(ConvNet(), exclude=["haed"])
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        bsdp.attach_deltas(ConvNet(), exclude=["*"])
    with pytest.raises(ValueError, match="`low`"):
        bsdp.attach_deltas(ConvNet(), low=0.5)
    deltas = with_random_deltas(ConvNet())
    with pytest.raises(ValueError, match="`density`"):
        bsdp.project_deltas(deltas, 2.0)
    with torch.no_grad():
        deltas["bn1.bias"].value[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        bsdp.project_deltas(deltas, 0.5)
    assert not any(delta.fixed for delta in deltas.values())
