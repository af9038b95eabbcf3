"""Whether tensors fit a model, told without changing it (hostile files are in `test_hostile_files`)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bsdp.fitting import check_names, check_names_and_shapes, check_values, expected_state, is_ordinary, meta_layer
from tests.helpers.cases import LAYER_CASES, LayerCase
from tests.helpers.nets import make_net


@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_a_meta_layer_is_the_layer_without_values(case: LayerCase) -> None:
    layer = case.build().double()
    meta = meta_layer(layer)
    assert repr(meta) == repr(layer)
    assert all(p.is_meta and p.dtype == torch.float64 for p in meta.parameters())
    assert [p.shape for p in meta.parameters()] == [p.shape for p in layer.parameters()]


def test_the_expected_state_is_that_after_a_replacement_under_every_name() -> None:
    net, new = make_net("shared"), nn.Conv2d(1, 1, 1, device="meta")
    assert expected_state(net, {}).keys() == net.state_dict().keys()
    state = expected_state(net, {net.first: new})
    assert state["first.weight"] is state["second.weight"] is new.weight
    assert net.first is not new
    net.first = net.second = new
    assert state.keys() == net.state_dict().keys()


def test_what_fits_is_let_through() -> None:
    net = make_net("conv")
    expected, state = expected_state(net, {}), net.state_dict()
    check_names(expected, state, path="file")
    check_values(expected, state, path="file")
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    check_values(expected, half, path="file")


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"a": (2,)}, r"file does not fit the model: it lacks \['b'\] and has unknown \[\]"),
        ({"a": (2,), "b": (3,), "c": ()}, r"it lacks \[\] and has unknown \['c'\]"),
        ({"a": (2, 1), "b": (3,)}, r"'a' has shape \(2, 1\), the model needs \(2,\)"),
    ],
)
def test_names_and_shapes_that_do_not_fit(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(ValueError, match=words):
        check_names_and_shapes(expected, shapes, path="file")
    if words.startswith(("file", "it lacks")):
        check_names_and_shapes(expected, shapes, path="file", strict=False)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("own", "value", "words"),
    [
        (torch.zeros(1), torch.tensor([NAN]), "file holds NaN or infinity in 'a'; take a file from before"),
        (torch.zeros(1), torch.tensor([INF]), "holds NaN or infinity in 'a';"),
        (torch.zeros(1).half(), torch.tensor([1e6]), r"in 'a' \(in torch.float16, which the model has\)"),
        (torch.zeros(1), torch.zeros(1, dtype=torch.int64), "'a' is torch.int64, the model needs torch.float32"),
        (torch.zeros(1, dtype=torch.int64), torch.zeros(1), "'a' is torch.float32, the model needs torch.int64"),
    ],
)
def test_values_that_do_not_fit(own: Tensor, value: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_values({"a": own}, {"a": value}, path="file")


def test_infinity_stays_where_it_is_and_unknown_names_are_skipped() -> None:
    mask = torch.tensor([0.0, -INF])
    check_values({"a": mask}, {"a": mask.clone(), "unknown": torch.tensor([NAN])}, path="file")


def test_tied_tensors_must_agree() -> None:
    tied = torch.zeros(2)
    check_values({"a": tied, "b": tied}, {"a": torch.ones(2), "b": torch.ones(2)}, path="file")
    with pytest.raises(ValueError, match="'a' and 'b' are one tensor there, but differ here"):
        check_values({"a": tied, "b": tied}, {"a": torch.ones(2), "b": tied}, path="file")


@pytest.mark.parametrize("value", ["text", 3, torch.zeros(2).to_sparse(), torch.zeros(2, device="meta")], ids=repr)
def test_only_dense_tensors_with_values_are_weights(value: Any) -> None:
    assert not is_ordinary(value)
    assert is_ordinary(torch.zeros(2)) and is_ordinary(nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match="'a' is not an ordinary dense tensor"):
        check_names({"a": torch.zeros(2)}, {"a": value}, path="file")
