from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DistributedSampler

from bsdp.datamodules.sampling import EpochSampler, TrainingLoader, as_is, seed_for
from tests.datamodules.sets import ToyDataModule

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec.*is deprecated")

SIZES = range(20)


class Recorder(LightningModule):
    """Notes epoch, batch index and the sum of every training batch.

    Args:
        counts_steps: Ask for the number of steps as the optimizer is made, which makes the loaders.
    """

    def __init__(self, *, counts_steps: bool = False) -> None:
        super().__init__()
        self.counts_steps = counts_steps
        self.layer = torch.nn.Linear(192, 2)
        self.seen: list[tuple[int, int, float]] = []

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch_idx, float(batch[0].double().sum())))
        return self.layer(batch[0].flatten(1)).sum()

    def predict_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return batch[1]

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.counts_steps:
            assert self.trainer.estimated_stepping_batches == 15
        return torch.optim.SGD(self.parameters(), lr=0.0)


class SaveAt(Callback):
    """Saves one checkpoint at a hook of epoch 1, a batch hook at one of its batches."""

    def __init__(self, hook: str, path: str, *, batch: int = 2) -> None:
        self.hook, self.path, self.batch, self.done = hook, path, batch, False
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, *args: object) -> None:
        at_batch = "batch" not in self.hook or args[-1] == self.batch
        if trainer.current_epoch == 1 and at_batch and not trainer.sanity_checking and not self.done:
            self.done = True
            trainer.save_checkpoint(self.path)


def fit(
    data: ToyDataModule,
    *,
    callbacks: list[Callback] | None = None,
    ckpt_path: str | None = None,
    counts_steps: bool = False,
    **arguments: object,
) -> Recorder:
    model = Recorder(counts_steps=counts_steps)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks or [],
        **({"max_epochs": 3} | arguments),  # type: ignore[arg-type]
    )
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return model


def toy(**arguments: object) -> ToyDataModule:
    return ToyDataModule(**({"batch_size": 8, "seed": 3} | arguments))  # type: ignore[arg-type]


def loader_of(**arguments: int) -> TrainingLoader:
    data = toy(**arguments)
    data.setup("fit")
    return data.train_dataloader()


def test_seeds_of_near_words_differ() -> None:
    words = [(0, 0), (0, 1), (1, 0), (0, 0, 1), (1, 1)]
    assert len({seed_for(*word) for word in words}) == len(words)
    assert seed_for(4, 2) == seed_for(4, 2)


def test_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = EpochSampler(SIZES, seed=seed)  # type: ignore[arg-type]
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0, 2)) == [(2, index) for index in SIZES]
    assert order(0, 2) == order(0, 2)
    assert [i for _, i in order(0, 2)] != [i for _, i in order(0, 3)]
    assert [i for _, i in order(0, 2)] != [i for _, i in order(1, 2)]
    assert [i for _, i in order(0, 2)] != list(SIZES)


@pytest.mark.parametrize(("count", "ranks"), [(20, 2), (20, 3), (3, 8)])
def test_processes_share_the_data_evenly(count: int, ranks: int) -> None:
    samplers = [EpochSampler(range(count), seed=0, num_replicas=ranks, rank=rank) for rank in range(ranks)]  # type: ignore[arg-type]
    shares = [[index for _, index in sampler] for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0])} == {-(-count // ranks)}
    assert {index for share in shares for index in share} == set(range(count))
    whole = [index for _, index in EpochSampler(range(count), seed=0)]  # type: ignore[arg-type]
    assert [index for row in zip(*shares, strict=True) for index in row][:count] == whole


def test_a_trainer_leaves_the_sampler_alone() -> None:
    assert isinstance(EpochSampler(SIZES, seed=0), DistributedSampler)  # type: ignore[arg-type]
    data = toy()
    fit(data)
    assert isinstance(data.trainer.train_dataloader.sampler, EpochSampler)  # type: ignore[union-attr]


def test_start_leaves_out_what_came_before() -> None:
    sampler = EpochSampler(SIZES, seed=0)  # type: ignore[arg-type]
    whole = list(sampler)
    sampler.start = 8
    assert list(sampler) == whole[8:]
    assert len(sampler) == 20


def test_module_shards_by_the_ranks_of_its_trainer() -> None:
    shares = []
    for rank in (0, 1):
        data = toy()
        data.setup("fit")
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)  # type: ignore[assignment]
        shares += [index for _, index in data.train_dataloader().sampler]
    assert sorted(shares) == list(range(40))


def test_workers_give_the_same_batches() -> None:
    for epoch in (0, 1):
        alone, workers = loader_of(num_workers=0), loader_of(num_workers=2)
        for loader in (alone, workers):
            loader.sampler.set_epoch(epoch)
        for (x, y), (u, v) in zip(alone, workers, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)


def test_living_workers_learn_the_epoch() -> None:
    alone, workers = loader_of(num_workers=0), loader_of(num_workers=1)
    assert workers.persistent_workers
    for epoch in (0, 1, 5):
        sums = []
        for loader in (alone, workers):
            loader.sampler.set_epoch(epoch)
            sums.append([float(x.sum()) for x, _ in loader])
        assert sums[0] == sums[1]


def test_epoch_is_read_when_the_first_batch_is_asked_for() -> None:
    loader = loader_of()
    iterator = iter(loader)
    loader.sampler.set_epoch(6)
    again = loader_of()
    again.sampler.set_epoch(6)
    assert torch.equal(next(iterator)[0], next(iter(again))[0])


def test_epochs_differ_and_runs_do_not() -> None:
    first, second = fit(toy()).seen, fit(toy()).seen
    assert first == second
    sums = [{value for epoch, _, value in first if epoch == number} for number in range(3)]
    assert not sums[0] & sums[1]
    assert not sums[1] & sums[2]
    assert first != fit(toy(seed=4)).seen


@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_train_batch_end", "on_validation_end", "on_train_epoch_end"]
)
@pytest.mark.parametrize("arguments", [{}, {"max_steps": 13, "max_epochs": -1}, {"val_check_interval": 2}])
def test_resumed_run_sees_the_batches_that_are_left(hook: str, arguments: dict[str, int], tmp_path: object) -> None:
    path = f"{tmp_path}/saved.ckpt"
    whole = fit(toy(), callbacks=[SaveAt(hook, path)], **arguments).seen
    rest = fit(toy(), ckpt_path=path, **arguments).seen
    done = torch.load(path, weights_only=True)["global_step"]
    assert 0 < done < len(whole)
    assert rest == whole[done:]


def test_resumes_in_the_middle_although_the_loader_was_made_before(tmp_path: object) -> None:
    path = f"{tmp_path}/saved.ckpt"
    whole = fit(toy(), callbacks=[SaveAt("on_train_batch_end", path)], counts_steps=True).seen
    assert fit(toy(), ckpt_path=path, counts_steps=True).seen == whole[8:]


def test_resumes_in_the_middle_with_workers(tmp_path: object) -> None:
    path = f"{tmp_path}/saved.ckpt"
    whole = fit(toy(), callbacks=[SaveAt("on_train_batch_end", path)]).seen
    assert fit(toy(num_workers=2), ckpt_path=path).seen == whole[8:]


def test_a_second_trainer_does_not_disturb_the_first() -> None:
    class TestAlone(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            other = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
            other.predict(Recorder(), trainer.datamodule, return_predictions=False)  # type: ignore[attr-defined]

    assert fit(toy(), callbacks=[TestAlone()]).seen == fit(toy()).seen


def test_resumes_after_an_exception_inside_a_step(tmp_path: object) -> None:
    path = f"{tmp_path}/saved.ckpt"

    class Stop(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.global_step == 7:
                trainer.save_checkpoint(path)

    whole = fit(toy(), callbacks=[Stop()]).seen
    assert fit(toy(), ckpt_path=path).seen == whole[7:]


def test_other_readers_of_the_loader_get_every_batch(tmp_path: object) -> None:
    path, counts = f"{tmp_path}/saved.ckpt", []

    class Reader(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            loaders = (trainer.train_dataloader, trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
            counts.append([len(list(loader)) for loader in loaders])

    whole = fit(toy(), callbacks=[SaveAt("on_train_batch_end", path), Reader()]).seen
    assert fit(toy(), callbacks=[Reader()], ckpt_path=path).seen == whole[8:]
    assert counts == [[5, 5]] * 5


@pytest.mark.parametrize(
    ("changed", "message"), [({"batch_size": 4}, "batch_size = 8, this run has 4"), ({"seed": 1}, "seed = 3")]
)
def test_refuses_other_batches_in_the_middle_of_an_epoch(
    changed: dict[str, int], message: str, tmp_path: object
) -> None:
    path = f"{tmp_path}/saved.ckpt"
    fit(toy(), callbacks=[SaveAt("on_train_batch_end", path)])
    with pytest.raises(ValueError, match=f"in the middle of an epoch with {message}.*config.yaml"):
        fit(toy(**changed), ckpt_path=path)


@pytest.mark.parametrize(("hook", "epochs"), [("on_train_batch_start", 2), ("on_train_epoch_end", 1)])
def test_other_batches_are_allowed_between_epochs(hook: str, epochs: int, tmp_path: object) -> None:
    path = f"{tmp_path}/saved.ckpt"
    fit(toy(), callbacks=[SaveAt(hook, path, batch=0)])
    assert len(fit(toy(batch_size=4), ckpt_path=path).seen) == 10 * epochs


def test_overfitting_takes_the_same_batches_in_every_epoch() -> None:
    with pytest.warns(UserWarning, match="requested to overfit"):
        seen = fit(toy(), overfit_batches=2).seen
    assert [value for epoch, _, value in seen if epoch == 0] == [value for epoch, _, value in seen if epoch == 2]


def test_as_is_changes_nothing() -> None:
    batch = (torch.ones(1), torch.ones(1))
    assert as_is(batch) is batch
