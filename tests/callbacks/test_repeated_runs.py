"""The same callbacks, trainers and modules used more than once, copied and pickled."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

import bsdp
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from tests.helpers.marks import slow_but
from tests.helpers.outcomes import Watch, check, ranks
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def callbacks() -> list[Any]:
    return [IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=2, tolerance=None), BasisDecomposition(), Watch()]


def fit(module: Any, used: list[Callback], folder: Path, **options: Any) -> Any:
    trainer = make_trainer(folder, used, **{"max_epochs": 4, **options})
    trainer.fit(module, datamodule=Stripes(batch_size=16))
    return trainer


def test_the_same_callbacks_for_one_module_after_another(tmp_path: Path) -> None:
    used, records = callbacks(), []
    for _ in range(2):
        torch.manual_seed(0)
        module = Classifier()
        used[2] = Watch()
        fit(module, used, tmp_path)
        check(module, used[0], used[2])
        records.append([entry.ranks for entry in used[0].record.rounds])
    assert records[0] == records[1]


def test_callbacks_go_from_a_plain_module_to_one_that_is_decomposed(tmp_path: Path) -> None:
    used = callbacks()
    fit(Classifier(), used, tmp_path)
    other = Classifier()
    fit(other, [BasisDecomposition()], tmp_path, max_epochs=1)
    used[2] = Watch()
    fit(other, used, tmp_path)
    check(other, used[0], used[2])


def test_fitting_a_pruned_module_again_prunes_it_further(tmp_path: Path) -> None:
    module, used = Classifier(), callbacks()
    trainer = fit(module, used, tmp_path)
    first = ranks(module)
    trainer.fit_loop.max_epochs = 8
    used[0].settings = IterativeBasisPruning(warmup_epochs=1, target=0.7, tolerance=None).settings
    trainer.fit(module, datamodule=Stripes(batch_size=16))
    second = used[0].record
    assert [entry.epoch for entry in second.rounds] == [0, 5, 6]  # a warm-up of its own
    assert list(second.rounds[0].ranks.values()) == first
    assert sum(ranks(module)) < sum(first)
    assert second.kept(second.rounds[-1], "params") <= 0.3  # type: ignore[operator]


def test_a_fit_with_nothing_left_to_do(tmp_path: Path) -> None:
    module, used = Classifier(), callbacks()
    trainer = fit(module, used, tmp_path)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    trainer.fit(module, datamodule=Stripes(batch_size=16))
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in state.items())


def test_a_tested_checkpoint_does_not_make_the_next_fit_a_resumed_one(tmp_path: Path) -> None:
    module, used = Classifier(), callbacks()
    trainer = fit(module, used, tmp_path)
    assert used[0].checkpoint_path is not None
    trainer.test(module, datamodule=Stripes(), ckpt_path=used[0].checkpoint_path, verbose=False, weights_only=True)
    used[2] = Watch()
    fresh = Classifier()
    fit(fresh, used, tmp_path)
    check(fresh, used[0], used[2])
    assert [entry.epoch for entry in used[0].record.rounds] == [0, 1, 2]


def test_validate_test_and_predict_before_and_after_a_fit(tmp_path: Path) -> None:
    class Predicting(Classifier):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0])

    module, used, data = Predicting(), callbacks(), Stripes(batch_size=16)
    data.setup("fit")
    loader = data.val_dataloader()
    trainer = make_trainer(tmp_path, used, max_epochs=4)

    def outputs() -> torch.Tensor:
        trainer.validate(module, loader, verbose=False)
        trainer.test(module, loader, verbose=False)
        return torch.cat(trainer.predict(module, loader))  # type: ignore[arg-type]

    images = data.examples.tensors[0]
    plain = module.network(images)
    torch.testing.assert_close(outputs(), plain, rtol=1e-4, atol=1e-5)
    assert used[0].record.rounds == []
    trainer.fit(module, datamodule=data)
    check(module, used[0], used[2])
    rounds = list(used[0].record.rounds)
    torch.testing.assert_close(outputs(), module.network(images), rtol=1e-4, atol=1e-5)
    assert used[0].record.rounds == rounds


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


COPIES = [(copy.deepcopy, True), (copy.deepcopy, False), (pickled, True), (pickled, False)]


@pytest.mark.parametrize(("duplicate", "after"), slow_but(COPIES[::3], COPIES))
def test_copies_work_like_the_originals(duplicate: Any, after: bool, tmp_path: Path) -> None:
    originals = callbacks()[:2]
    module = Classifier()
    if after:
        fit(module, originals, tmp_path)
    pruning, decomposition = duplicate(originals[0]), duplicate(originals[1])
    assert pruning.settings == originals[0].settings
    assert pruning.record.rounds == originals[0].record.rounds
    fresh, watch = Classifier(), Watch()
    fit(fresh, [pruning, decomposition, watch], tmp_path)
    check(fresh, pruning, watch)
    if after:  # the module of the original is not the copy's
        assert originals[0].pruner.model is module
        assert ranks(module) == list(originals[0].record.rounds[-1].ranks.values())


def test_copy_of_a_pruned_module(tmp_path: Path) -> None:
    module = Classifier()
    fit(module, callbacks(), tmp_path)
    images = torch.randn(2, 1, 8, 8)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert ranks(twin) == ranks(module)
        assert torch.equal(twin.eval()(images), module.eval()(images))
        assert not (set(map(id, twin.parameters())) & set(map(id, module.parameters())))
        assert list(bsdp.named_pairs(twin)) == list(bsdp.named_pairs(module))
