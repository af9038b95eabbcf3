"""The gradient of distillation against autograd of the written loss, and the copy of the model as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bsdp
from bsdp.distillation import SelfDistillation, distillation_gradient, seeing_scores
from tests.helpers.nets import ConvNet


def scores(*, seed: int = 0) -> Tensor:
    return 3 * torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 4)).double()


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(12, 8, dtype=torch.float64, generator=generator), torch.randint(4, (12,), generator=generator)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_is_that_of_the_loss(temperature: float) -> None:
    student, teacher = scores().requires_grad_(), scores(seed=1)
    loss = bsdp.distillation_loss(student, teacher, temperature)
    old, new = (F.softmax(x / temperature, dim=1) for x in (teacher, student))
    by_hand = temperature**2 * (old * (old / new).log()).sum(1).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-12) and loss.item() > 0
    torch.testing.assert_close(
        distillation_gradient(student, teacher, temperature), torch.autograd.grad(loss, student)[0]
    )


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize(("parts", "scale"), [(1, 1.0), (3, 1.0), (3, 1024.0)])
def test_parameters_get_the_gradient_of_the_mixed_loss(weight: float, parts: int, scale: float) -> None:
    student, teacher = small(0), small(1)
    written = copy.deepcopy(student)
    images, labels = examples()
    distiller = bsdp.Distiller(copy.deepcopy(teacher), weight=weight, temperature=3.0)
    batches = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))
    torch.manual_seed(2)
    for inputs, targets in batches:
        with distiller.attached(student, scale=scale / parts):
            outputs = student(inputs)
        (scale * F.cross_entropy(outputs, targets) / parts).backward()
    torch.manual_seed(2)
    for inputs, targets in batches:
        outputs = written(inputs)
        loss = (1 - weight) * F.cross_entropy(outputs, targets)
        loss = loss + weight * bsdp.distillation_loss(outputs, teacher.eval()(inputs).detach(), 3.0)
        (scale * loss / parts).backward()
    for own, expected in zip(student.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad)


def test_scores_that_change_in_place_and_half_precision() -> None:
    student, teacher = small(0).float(), small(1).float()
    images, labels = examples()
    grads = []
    for in_place in (False, True):
        student.zero_grad()
        torch.manual_seed(0)
        with bsdp.Distiller(teacher).attached(student), torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = student(images.float())
            outputs = outputs.mul_(0.5) if in_place else outputs * 0.5
            F.cross_entropy(outputs, labels).backward()
        grads.append([p.grad for p in student.parameters()])
    assert outputs.dtype == torch.bfloat16
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True) if first is not None)


def test_a_manual_loop_comes_close_to_the_teacher_without_labels() -> None:
    student, teacher = small(0), small(1)
    distiller = bsdp.Distiller(teacher, weight=1.0, temperature=1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    images, _ = examples()

    def distance() -> float:
        return float(bsdp.distillation_loss(student.eval()(images), teacher(images), 1.0).detach())

    before = distance()
    for _ in range(60):
        optimizer.zero_grad()
        with distiller.attached(student.train()):
            (0 * student(images).sum()).backward()
        optimizer.step()
    assert distance() < 0.1 * before
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters()) and not teacher.training
    assert not student._forward_hooks and not student._forward_pre_hooks


class Tuple(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.linear, self.output = nn.Linear(8, 4), output

    def forward(self, inputs: Tensor) -> Any:
        return self.output(self.linear(inputs))


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        (lambda x: {"logits": x}, "returned a dict"),
        (lambda x: (x, x), "returned a tuple"),
        (lambda x: x[..., None], r"returned a tensor of shape \[12, 4, 1\]"),
        (lambda x: x[:, :1], r"returned a tensor of shape \[12, 1\]"),
    ],
)
def test_what_are_no_class_scores_is_refused(output: Any, shown: str) -> None:
    student = Tuple(output)
    images = examples()[0].float()
    with bsdp.Distiller(copy.deepcopy(student)).attached(student, name="'body'"):
        with torch.no_grad():
            student(images)  # which learns nothing
        with pytest.raises(ValueError, match=rf"'body' {shown}.*`distillation_module`.*`distillation` to 0"):
            student(images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": 1.5}, r"`weight` must be in \[0, 1\], got 1.5"),
        ({"weight": True}, r"`weight` must be in \[0, 1\], got True"),
        ({"temperature": 0.0}, "`temperature` must be above 0 and finite, got 0.0"),
        ({"temperature": float("inf")}, "`temperature` must be above 0 and finite, got inf"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bsdp.Distiller(nn.Identity(), **arguments)


def test_a_module_that_calls_itself_counts_once() -> None:
    class Redirected(Tuple):
        def forward(self, inputs: Tensor, again: bool = False) -> Any:
            return self(inputs, again=False).sum() if again else self.linear(inputs)

    seen: list[Tensor] = []
    module = Redirected(None)
    with seeing_scores(module, lambda _a, _n, output: seen.append(output)):
        module(torch.ones(3, 8), again=True)
    assert [list(entry.shape) for entry in seen] == [[3, 4]]


def pruner(**settings: Any) -> tuple[nn.Module, bsdp.IterativePruner]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": ConvNet()})
    bsdp.decompose(model)
    options: dict[str, Any] = {"target": 0.4, "rounds": 2, "tolerance": None, "importance": "magnitude", **settings}
    network = model["body"]
    made = bsdp.IterativePruner(
        model, bsdp.PruningSettings(**options), bsdp.measure_cost(network), network="body", monitor="value"
    )
    return model, made


def test_the_teacher_is_the_network_at_the_best_validation_of_the_warm_up() -> None:
    model, made = pruner(distillation=0.5)
    images = torch.randn(5, 3, 8, 8)
    expected = model["body"].eval()(images).detach()
    made.observe(0.9)
    assert made.distillation is not None and not made.distillation.started
    with torch.no_grad():
        model["body"].head.weight.mul_(2.0)
    made.observe(0.8)
    assert made.cut(1) and made.distillation.started
    made.observe(0.95)
    teacher = made.distillation.teacher()
    torch.testing.assert_close(teacher(images), expected)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert made.ranks != made.record.rounds[0].ranks  # the model itself stays cut


def test_without_validation_the_teacher_is_the_model_before_the_first_cut() -> None:
    model, made = pruner(distillation=0.5)
    images = torch.randn(5, 3, 8, 8)
    assert made.distillation is not None
    with pytest.raises(ValueError, match=r"no unpruned model to learn from.*Set `distillation` to 0"):
        made.distillation.teacher()
    expected = model["body"].eval()(images).detach()
    made.cut(1)
    torch.testing.assert_close(made.distillation.teacher()(images), expected)
    state = made.state_dict()
    made.cut(2)
    other, resumed = pruner(distillation=0.5)
    bsdp.rebuild(other, bsdp.structure_of(model))
    resumed.load_state_dict(state)
    assert resumed.distillation is not None
    torch.testing.assert_close(resumed.distillation.teacher()(images), expected)
    state["record"]["reference_state"] = None
    with pytest.raises(ValueError, match="that had finished without `distillation`"):
        resumed.load_state_dict(state)


def test_learning_begins_with_the_first_cut() -> None:
    model, made = pruner(distillation=1.0, distillation_temperature=1.0)
    network, images = model["body"].eval(), torch.randn(5, 3, 8, 8)

    def gradient() -> Tensor:
        model.zero_grad()
        with made.distilling():
            (2.0 * network(images).sum()).backward()
        return network.head.bias.grad.clone()  # type: ignore[no-any-return]

    assert torch.equal(gradient(), torch.full((4,), 10.0))
    made.cut(1)
    teacher = made.distillation.teacher()  # type: ignore[union-attr]
    expected = distillation_gradient(network(images), teacher(images), 1.0).sum(0)
    torch.testing.assert_close(gradient(), expected)
    assert made.distillation.seen == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distillation": -0.1}, r"`distillation` must be in \[0, 1\], got -0.1"),
        ({"distillation": 0.5, "distillation_temperature": -1.0}, "`distillation_temperature` must be above 0"),
        ({"distillation": 0.5, "warmup_epochs": 0}, "`warmup_epochs` must be at least 1"),
        ({"distillation": 0.5, "distillation_module": "head"}, "`distillation_module` must be .* got 'head'.*'body'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruner(**settings)


def test_a_named_module_may_hold_more_than_the_network() -> None:
    model, made = pruner(distillation=0.5)
    wrapper = nn.ModuleDict({"all": model})
    made.cut(1)
    record = made.record
    record.reference_state = {f"all.{key}": value for key, value in (record.reference_state or {}).items()}
    named = SelfDistillation(wrapper, record, "all.body", weight=0.5, temperature=1.0)
    assert named.student is model["body"]
    assert {n: p.rank for n, p in bsdp.named_pairs(named.teacher()).items()} == record.rounds[0].ranks
