"""What the network in a module is measured on: an example of the user's, what training gives it, or a guess."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import Tensor, nn
from torch.nn import functional as F

import bsdp
from bsdp.callbacks import BasisDecomposition, ChannelPruning, IterativeBasisPruning, TwoTemperaturePruning
from bsdp.callbacks._measuring import FirstInputs, NotReplayableError, _tensors_of
from tests.helpers.pruning_runs import Batch, Classifier, Stripes, make_trainer, small_network


class Smaller(Classifier):
    """Trains on images of half the size of those in the batch; other sizes pass, too."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(F.avg_pool2d(batch[0], 2)), batch[1])


class Network(nn.Module):
    """Takes more than one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = small_network()
        self.needs_scale = False

    def forward(self, images: Any, twice: bool = False, scale: Any = None, *, shift: float = 0.0) -> Tensor:
        images = images[0] if isinstance(images, list) else images
        if self.needs_scale:
            images = images * scale[0]
        output: Tensor = self.layers(images + shift)
        return output * 2 if twice else output


class Calling(Classifier):
    """Calls its network in a way of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.network = Network()  # type: ignore[assignment]
        self.how = how
        self.network.needs_scale = how == "needed"  # type: ignore[assignment]
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        calls: dict[str, Any] = {
            "by name": lambda: self.network(images=images),
            "default": lambda: self.network(images, False),
            "flag": lambda: self.network(images, True),
            "keyword": lambda: self.network(images, shift=0.5),
            "keyword default": lambda: self.network(images, shift=0.0),
            "tensor by name": lambda: self.network(images, scale=torch.ones(1)),
            "needed": lambda: self.network(images, scale=[1.0]),
            "list": lambda: self.network([images]),
        }
        output: Tensor = calls[self.how]()
        return output


def pruned(module: Classifier, folder: Path, **options: Any) -> IterativeBasisPruning:
    given: dict[str, Any] = {"warmup_epochs": 1, "target": 0.5, "rounds": 1, "tolerance": None, **options}
    pruning = IterativeBasisPruning(**given)
    trainer = make_trainer(folder, [pruning, BasisDecomposition()], max_epochs=2)
    trainer.fit(module, datamodule=Stripes())
    return pruning


def channels(module: Classifier, folder: Path) -> ChannelPruning:
    pruning = ChannelPruning(warmup_epochs=1, target=0.3, rounds=1, tolerance=None)
    make_trainer(folder, [pruning], max_epochs=2).fit(module, datamodule=Stripes())
    return pruning


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_what_training_gives_is_measured(kind: str, tmp_path: Path) -> None:
    record = pruned(Smaller(), tmp_path, target_kind=kind).record
    assert record.input_shapes == [[1, 1, 4, 4]]
    assert record.original("macs") == bsdp.describe(small_network(), torch.zeros(1, 1, 4, 4)).macs


def test_a_wrong_guess_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="measured the network on inputs of 1x8x8, .* in training it gets 1x4x4"):
        channels(Smaller(), tmp_path)
    channels(Classifier(), tmp_path)  # here a warning is an error
    told = Smaller()
    told.example_input_array = torch.zeros(2, 1, 4, 4)
    assert channels(told, tmp_path).record.input_shapes == [[1, 1, 4, 4]]


@pytest.mark.parametrize("how", ["by name", "default", "flag", "keyword", "keyword default", "tensor by name"])
def test_calls_that_come_down_to_tensors(how: str, tmp_path: Path) -> None:
    for module in (Calling(how), told := Calling(how)):
        if module is told:
            module.example_input_array = None
        record = pruned(module, tmp_path, target_kind="macs").record
        assert record.input_shapes == [[1, 1, 8, 8]]
        assert record.original("macs") == bsdp.describe(small_network(), torch.zeros(1, 1, 8, 8)).macs


REASONS = {
    "list": r"Network is called with \(list\), and only networks that take tensors",
    "needed": r"Network fails without `scale` \(.*not subscriptable",
}


@pytest.mark.parametrize(("how", "reason"), REASONS.items())
def test_other_calls_leave_macs_unknown(how: str, reason: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"MACs are not reported: {reason}"):
        pruning = pruned(Calling(how), tmp_path)
    assert pruning.record.rounds[-1].macs is None and len(pruning.record.rounds) == 2
    with pytest.raises(ValueError, match=f"`IterativeBasisPruning` needs the shape of the input, but {reason}"):
        pruned(Calling(how), tmp_path, target_kind="macs")
    with pytest.raises(ValueError, match=f"`ChannelPruning` needs the shape of the input, but {reason}"):
        channels(Calling(how), tmp_path)


@pytest.mark.parametrize(("how", "reason"), REASONS.items())
def test_without_an_example_they_are_told_of(how: str, reason: str, tmp_path: Path) -> None:
    unknown = Calling(how)
    unknown.example_input_array = None
    with pytest.warns(UserWarning, match=f"MACs are not reported: {reason}"):
        assert len(pruned(unknown, tmp_path).record.rounds) == 2


def test_a_network_that_is_not_called(tmp_path: Path) -> None:
    class Aside(Classifier):
        def forward(self, images: Tensor) -> Tensor:
            output: Tensor = self.network[3](self.network[1:3](self.network[0](images)))
            return output

    module = Aside()
    module.example_input_array = torch.zeros(2, 1, 8, 8)
    with pytest.warns(UserWarning, match="`forward` of Aside did not call `network`"):
        assert pruned(module, tmp_path).record.rounds[-1].macs is None


def test_a_cut_before_the_first_batch_goes_by_a_guess_that_is_looked_at(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_kind": "macs", "warmup_epochs": 0, "importance": "magnitude"}
    assert [entry.epoch for entry in pruned(Classifier(), tmp_path, **options).record.rounds] == [0, 0]
    with pytest.warns(UserWarning, match="measured the network on inputs of 1x8x8, .* in training it gets 1x4x4"):
        pruned(Smaller(), tmp_path, **options)


class Wrapping(nn.Module):
    """As DistributedDataParallel."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> Any:
        return self.module(*arguments)


def test_under_a_strategy_that_wraps_the_module() -> None:
    """There `training_step` passes as `forward` of the module, which is the network where layers are spread."""

    class Bare(Smaller):
        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            return super().training_step((batch, torch.zeros(3, dtype=torch.long)), 0)

    module, other = Smaller(spread=True), Bare(spread=True)
    images, labels = torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.long)
    for each, arguments in ((module, ((images, labels), 0)), (other, (images,))):
        first = FirstInputs(each)
        _ForwardRedirection()(Wrapping(each), each, "training_step", *arguments)
        assert first.shapes == [[1, 1, 4, 4]]


def test_a_step_that_takes_its_batch_apart(tmp_path: Path) -> None:
    class Apart(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.network.forward(batch.pop(0)), batch.pop(0))  # which no hook sees

    assert pruned(Apart(), tmp_path, target_kind="macs").record.input_shapes == [[1, 1, 8, 8]]


def test_a_search_that_begins_in_the_first_batch(tmp_path: Path) -> None:
    search: dict[str, Any] = {"target": 0.5, "target_kind": "macs", "search_epochs": 1, "tolerance": None}
    for warmup, size in ((0, 8), (1, 4)):
        searching = TwoTemperaturePruning(warmup_epochs=warmup, **search)
        trainer = make_trainer(tmp_path, [searching, BasisDecomposition()], max_epochs=3)
        told = pytest.warns(UserWarning, match="in training it gets 1x4x4") if warmup == 0 else nullcontext()
        with told:
            trainer.fit(Smaller(), datamodule=Stripes())
        assert searching.record.input_shapes == [[1, 1, size, size]]


def test_no_hook_is_left_behind(tmp_path: Path) -> None:
    class Failing(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            raise RuntimeError("no step")

    module = Failing()
    with pytest.raises(RuntimeError, match="no step"):
        pruned(module, tmp_path)
    assert not module.network._forward_pre_hooks


def test_what_must_be_given_is_not_forgotten_for_what_may_be() -> None:
    class Second(nn.Module):
        def forward(self, images: Tensor, sizes: list[int], flag: bool = False) -> Tensor:
            return images

    images = torch.zeros(1, 1, 8, 8)
    with pytest.raises(NotReplayableError, match=r"Second is called with \(Tensor, list, flag=bool\)"):
        _tensors_of(Second(), (images, [8]), {"flag": True})
