"""How far outputs are apart: nests, shapes that differ, NaN, and what rounding explains."""

import math

import pytest
import torch
from torch import nn

from bsdp._compare import Difference, largest_difference, tensors_of, tolerance_for


def test_the_same_outputs_do_not_differ() -> None:
    outputs = {"logits": torch.randn(3, 4), "boxes": [torch.randn(2), torch.zeros(0, 4)]}
    assert largest_difference(outputs, outputs) == Difference(0.0, 0.0)
    assert str(largest_difference(outputs, outputs)) == "0.0e+00"


def test_the_largest_difference_of_all_tensors_counts_relative_to_the_largest_value() -> None:
    expected = [torch.tensor([1.0, -8.0]), (torch.tensor([2]), "text")]
    found = [torch.tensor([1.5, -8.0]), (torch.tensor([4]), "text")]
    difference = largest_difference(expected, found)
    assert difference == Difference(2.0, 0.25)
    assert str(difference) == "2.0e+00, relative 2.5e-01"
    assert largest_difference(torch.zeros(2), torch.ones(2)) == Difference(1.0, 1.0)


@pytest.mark.parametrize("found", [torch.zeros(3, 1), [torch.zeros(3), torch.zeros(3)], "nothing"])
def test_outputs_of_another_shape_are_infinitely_far(found: object) -> None:
    assert largest_difference(torch.zeros(3), found).relative == math.inf


def test_no_outputs_are_not_the_same_outputs() -> None:
    assert largest_difference([], []).absolute == math.inf


def test_nan_is_never_within_a_tolerance() -> None:
    broken = torch.tensor([0.0, math.nan])
    for pair in ((broken, torch.zeros(2)), (torch.zeros(2), broken), ([torch.ones(1), broken], [torch.ones(1)] * 2)):
        assert not largest_difference(*pair).relative <= 1.0


def test_tensors_come_without_their_graph() -> None:
    (only,) = tensors_of({"a": torch.ones(1, requires_grad=True) * 2, "b": 3})
    assert not only.requires_grad


def test_half_precision_may_round_more() -> None:
    assert tolerance_for(nn.Linear(2, 2)) == tolerance_for(nn.Linear(2, 2).double()) == tolerance_for(nn.ReLU()) == 1e-4
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    assert tolerance_for(mixed) == tolerance_for(nn.Linear(2, 2).half()) == 3e-2
