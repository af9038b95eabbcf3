"""Running statistics of batch norms recomputed on data."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import bsdp


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))
    model.append(nn.BatchNorm2d(2, momentum=0.3))
    model.append(nn.BatchNorm2d(2, track_running_stats=False))
    return model.train()


def images(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 8, 3, 6, 6, generator=torch.Generator().manual_seed(1)) + 1.0)


def test_statistics_are_those_counted_by_hand() -> None:
    model, batches = network(), images()
    model[1](torch.randn(2, 4, 3, 3))  # something to be forgotten
    assert bsdp.recalibrate_batch_norms(model, batches) == ["1", "5"]

    outputs = [model[0](batch).detach() for batch in batches]
    means = [o.mean((0, 2, 3)) for o in outputs]
    variances = [o.var((0, 2, 3)) for o in outputs]
    torch.testing.assert_close(model[1].running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack(variances).mean(0))
    # The next one reads what the first one gives with the statistics of each batch, without dropout.
    normal = [
        (o - m[:, None, None]) / (o.var((0, 2, 3), unbiased=False) + 1e-5).sqrt()[:, None, None]
        for o, m in zip(outputs, means, strict=True)
    ]
    second = [model[4](o.relu()).detach() for o in normal]
    torch.testing.assert_close(model[5].running_mean, torch.stack([o.mean((0, 2, 3)) for o in second]).mean(0))


def test_only_statistics_change() -> None:
    model = network()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model[3].eval()
    state = torch.random.get_rng_state()
    bsdp.recalibrate_batch_norms(model, iter([(batch,) for batch in images()]))

    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert [m.training for m in model] == [True, True, True, False, True, True, True]
    assert (model[1].momentum, model[5].momentum) == (0.1, 0.3)
    assert int(model[1].num_batches_tracked) == 0
    assert torch.equal(torch.random.get_rng_state(), state)


def broken() -> Iterator[Tensor]:
    yield from images(1)
    yield images(1)[0] * float("nan")


@pytest.mark.parametrize(("batches", "match"), [([], "`batches` is empty"), (broken(), "NaN or infinite")])
def test_refusals_leave_everything_as_it_was(batches: Iterator[Tensor], match: str) -> None:
    model = network()
    model(images(1)[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        bsdp.recalibrate_batch_norms(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model[1].momentum, model.training) == (0.1, True)


def test_batch_norms_that_are_not_reached_keep_theirs() -> None:
    model = nn.ModuleDict({"used": nn.BatchNorm1d(2), "idle": nn.BatchNorm1d(2)})
    model["idle"].running_mean.fill_(3.0)
    model.forward = model["used"].forward  # type: ignore[method-assign]
    assert bsdp.recalibrate_batch_norms(model, [torch.randn(4, 2)]) == ["used"]
    assert model["idle"].running_mean.tolist() == [3.0, 3.0]


def test_a_model_without_batch_norms_is_left_alone() -> None:
    assert bsdp.recalibrate_batch_norms(nn.Linear(2, 2), []) == []
