"""Training batches of our own beside a trainer: through the module's `training_step` where it can be, without a trace.

A module may normalise images, unpack a batch or call its networks in `training_step`, so only that shows what reaches
the layers in training. It runs in eval mode; where it needs training mode, as with a detector that gives losses in that
mode only, single layers still behave as in evaluation. Where it cannot be run (manual optimization, steps that need
what is not there), ``forward`` gets the first floating-point tensor of the batch.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map
from torchmetrics import Metric, MetricCollection

from bsdp.callbacks._evaluation import random_state_kept
from bsdp.callbacks._measuring import as_parameters, call_network, only_network, own_iterator
from bsdp.callbacks._processes import all_agree
from bsdp.compiling import uncompiled
from bsdp.gradient_moments import check_logits
from bsdp.probing import evaluating, first_tensor

_AS_IN_EVALUATION = (_NormBase, _DropoutNd, nn.MultiheadAttention)
_WAYS_OUT = {
    "metric: activation": "`metric: euclidean` does without.",
    "metric: kfac": "`rebase: never` does without.",
    "recalibration_batches": "`recalibration_batches: 0` does without.",
}
_INTERNAL = frozenset(vars(LightningModule()))  # what Lightning and torch keep in every module


def why_no_step(pl_module: LightningModule) -> str | None:
    """Why `training_step` cannot be run on batches of our own, half a sentence; None if it can."""
    if not pl_module.automatic_optimization:
        return "in manual optimization `training_step` makes steps of its own"
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        return "`training_step` takes `dataloader_iter`"
    return None


class OwnPasses:
    """Runs the module on its first training batches, through `training_step` where that is possible.

    Args:
        trainer: The trainer, in training.
        pl_module: The module.
        setting: What needs the passes, for errors.
        batches: Batches to read in each process, at most; not more than an epoch has.
        outputs: Whether what the network puts out is needed.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, *, setting: str, batches: int, outputs: bool = False
    ) -> None:
        self.trainer, self.module, self.setting = trainer, pl_module, setting
        self.limit = int(min(batches, trainer.num_training_batches))
        self.outputs = outputs
        self.reason = why_no_step(pl_module)
        self.stepping = self.reason is None
        self.training = False

    def check(self) -> tuple[Any, Any] | None:
        """Find out on the first batch how the module can be run. Call it before `runs`.

        Returns:
            The batch, and the network's output on it (None if it was not seen, where it is not needed); None if there
            is no batch.

        Raises:
            ValueError: If the module cannot be run on a batch alone, or there is no floating-point tensor in it.
        """
        with evaluating(self.module), self._steps(1, ()) as steps:
            for step in steps:
                can_step, output = self._try_step(step) if self.stepping else (False, None)
                self.stepping = all_agree(self.trainer, self.module, can_step)
                self.training = not all_agree(self.trainer, self.module, not self.training)
                if self.stepping:
                    return step.batch, output
                output = self._forward(step.batch)
                if self.outputs:
                    check_logits(output)
                if self.trainer.global_step == 0:
                    rank_zero_info(
                        f"bsdp: `{self.setting}` gives the first floating-point tensor of training batches to `forward`"
                        f" as it comes, because {self.reason or 'another process does'}"
                    )
                return step.batch, output
        return None

    def runs(self, changing: Collection[nn.Module] = ()) -> Iterator[Callable[[], Any]]:
        """A function for each batch that runs the module on it and gives the network's output, None if it was not seen.

        Modes are the caller's. Random numbers, gradients, buffers, metrics, loggers and the module's own attributes are
        as before once the iterator ends.

        Args:
            changing: Modules that keep the buffers they then have.
        """
        with self._steps(self.limit, changing) as steps:
            for step in steps:
                yield partial(self._run, step)

    @contextmanager
    def _steps(self, limit: int, changing: Collection[nn.Module]) -> Iterator[Iterator[OwnStep]]:
        with random_state_kept(), own_steps(self.trainer, self.module, limit, seed=0, changing=changing) as steps:
            yield steps

    def look_at_first(self, look: Callable[[Any, Any], str | None]) -> str | None:
        """Run `training_step` on the first batch, for a look at what it returns and what the network puts out.

        Args:
            look: Takes both, while their graph is there.

        Returns:
            What `look` returns; a note if there is no batch.
        """
        with evaluating(self.module), self._steps(1, ()) as steps:
            for step in steps:
                return look(*self._step(step))
        return "there is no training batch"

    def _try_step(self, step: OwnStep) -> tuple[bool, Any]:
        """Whether the step can be run, and what the network puts out in it."""
        # It may need what is not there, training mode or a state of its own, and raise whatever it likes.
        for self.training in (False, True):
            try:
                _, output = self._step(step)
                if self.outputs:
                    check_logits(output)
            except Exception as error:
                self.reason = self.reason or f"`training_step` cannot be run alone ({type(error).__name__}: {error})"
            else:
                return True, output
        return False, None

    def _run(self, step: OwnStep) -> Any:
        if not self.stepping:
            return self._forward(step.batch)
        try:
            _, output = self._step(step)
        except Exception:  # a batch that is unlike the first one
            return self._forward(step.batch)
        return self._forward(step.batch) if output is None and self.outputs else output

    def _step(self, step: OwnStep) -> tuple[Any, Any]:
        """What the step returns, and what the module puts out in it; its one network, where it does not call itself."""
        name, own, inner = only_network(self.module), list[Any](), list[Any]()
        handles = [self.module.register_forward_hook(lambda _module, _inputs, output: own.append(output))]
        if name:
            part = self.module.get_submodule(name)
            handles.append(part.register_forward_hook(lambda _module, _inputs, output: inner.append(output)))
        try:
            with torch.enable_grad(), self._modes():  # a step may take gradients of its own
                result = step()
        finally:
            for handle in handles:
                handle.remove()
        return result, _learnt_from(own or inner)

    @contextmanager
    def _modes(self) -> Iterator[None]:
        """Where the step needs it, what has parts is in training mode, but for norms, dropout and torch's attention."""
        found = [m for m in self.module.modules() if any(m.children()) and not isinstance(m, _AS_IN_EVALUATION)]
        changed = [m for m in found if self.training and not m.training]
        for module in changed:
            module.training = True
        try:
            yield
        finally:
            for module in changed:
                module.training = False

    def _forward(self, batch: Any) -> Any:
        tensor = first_tensor(batch)
        if tensor is None:
            raise ValueError(
                f"`{self.setting}` reads the first floating-point tensor of a training batch, and there is none."
            )
        try:
            return call_network(self.module, as_parameters(tensor, self.module))
        except Exception as error:  # whatever the user's forward may raise on an input we guessed
            reason = self.reason or "`training_step` cannot be run alone in another process"
            raise ValueError(
                f"`{self.setting}` needs to run the module on training batches, but {reason}, and `forward` failed on "
                f"the first tensor of a batch ({type(error).__name__}: {error}). {_WAYS_OUT.get(self.setting, '')}"
            ) from error


def _learnt_from(outputs: list[Any]) -> Any:
    """The last of a network's outputs that a loss can have a gradient for; else the last one."""
    with_graph = (
        o for o in reversed(outputs) if any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(o))
    )
    return next(with_graph, outputs[-1] if outputs else None)


@contextmanager
def own_steps(
    trainer: Trainer, pl_module: LightningModule, batches: int, *, seed: int, changing: Collection[nn.Module] = ()
) -> Iterator[Iterator[OwnStep]]:
    """The first training batches of an order of our own, each with the step that the module makes of it.

    Modules stay in the mode they are in. Afterwards buffers, metrics, loggers and the module's own attributes are as
    before; random numbers are for the caller to keep.

    Args:
        trainer: The trainer, in training.
        pl_module: The module.
        batches: How many batches; there may be fewer.
        seed: Of the order of the batches and everything else that is random.
        changing: Modules that keep the buffers they then have.
    """
    with ExitStack() as stack:
        for context in (uncompiled(), _muted(trainer, pl_module), _state_kept(pl_module, changing)):
            stack.enter_context(context)
        seed_all(seed)
        stack.enter_context(_generators_kept(trainer.train_dataloader))
        loader = islice(own_iterator(trainer.train_dataloader), batches)
        yield (OwnStep(trainer, pl_module, batch, index, seed=seed + 1 + index) for index, batch in enumerate(loader))


class OwnStep:
    """A training step on one batch, with the same random numbers in every call."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int, *, seed: int) -> None:
        self.trainer, self.module, self.index, self.seed = trainer, pl_module, index, seed
        seed_all(seed)
        batch = trainer.precision_plugin.convert_input(batch)
        batch = _owner(trainer, pl_module, "on_before_batch_transfer").on_before_batch_transfer(batch, 0)
        self.batch = trainer.strategy.batch_to_device(batch)

    def __call__(self) -> Any:
        """What `training_step` returns."""
        seed_all(self.seed)
        step = self.module.training_step
        batch = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.batch)
        arguments = (batch, self.index) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)
        with self._precision():
            return step(*arguments)

    def _precision(self) -> AbstractContextManager[Any]:
        plugin = self.trainer.precision_plugin
        # Second derivatives drown in the rounding of autocast, and no gradient scaler is at work here.
        return nullcontext() if isinstance(plugin, MixedPrecision) else plugin.train_step_context()


def _owner(trainer: Trainer, pl_module: LightningModule, hook: str) -> Any:
    """Who has a hook for batches: the data module, if it has its own, else the module."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return data if data is not None and is_overridden(hook, data, LightningDataModule) else pl_module


def seed_all(seed: int) -> None:
    """Seed torch, numpy and python."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)  # else the call stack is written down for every absent device: 2 ms
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def _generators_kept(loader: Any) -> Iterator[None]:
    """Give the random generators of a loader, its samplers and its data (of several, the first) their states back."""
    loader = next(iter(tree_leaves(loader)), None)
    holders = [getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset")]
    holders += [loader, getattr(holders[1], "sampler", None)]
    values = [value for holder in holders for value in getattr(holder, "__dict__", {}).values()]
    found = {id(value): value for value in values if isinstance(value, _GENERATORS)}
    kept = [(generator, _state_of(generator)) for generator in found.values()]
    try:
        yield
    finally:
        for generator, state in kept:
            _set_state(generator, state)


@contextmanager
def _muted(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Log nothing, to no logger, and put copies in the place of all metrics."""
    loggers, originals = trainer.loggers, _metrics(pl_module)
    names: tuple[str, ...] = ("log", "log_dict")
    taken = {key: pl_module.__dict__[key] for key in names if key in pl_module.__dict__}
    try:
        trainer.loggers = [DummyLogger() for _ in loggers]
        for parent, name, metric in originals:
            parent._modules[name] = copy.deepcopy(metric)
        # An attribute on the instance hides the method.
        pl_module.__dict__["log"] = pl_module.__dict__["log_dict"] = lambda *_args, **_options: None
        yield
    finally:
        for key in names:
            pl_module.__dict__.pop(key, None)
        pl_module.__dict__.update(taken)
        for parent, name, metric in originals:
            parent._modules[name] = metric
        trainer.loggers = loggers


def _metrics(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """The outermost metrics of a module, with who holds them under which name."""
    found: list[tuple[nn.Module, str, nn.Module]] = []
    for name, child in module.named_children():
        found += [(module, name, child)] if isinstance(child, (Metric, MetricCollection)) else _metrics(child)
    return found


@contextmanager
def _state_kept(pl_module: LightningModule, changing: Collection[nn.Module]) -> Iterator[None]:
    """Give tensors (but buffers of `changing`), and the plain attributes of the module itself, their values back."""
    free = set(changing)
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in pl_module.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and module not in free
    ]
    # Steps may change weights, as an average of others does; what they leave alone is not written.
    weights = [(weight, weight._version, weight.detach().to("cpu", copy=True)) for weight in pl_module.parameters()]
    kept = [(module, _own_attributes(module)) for module in pl_module.modules() if module not in free]
    contents = _contents([value for _, attributes in kept for value in attributes.values()])
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                buffer.copy_(value)
            for weight, version, value in weights:
                if weight._version != version:
                    weight.copy_(value)
        for module, attributes in kept:
            for key in _own_attributes(module).keys() - attributes.keys():
                del module.__dict__[key]
            module.__dict__.update(attributes)
        _restore(contents)


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps beside what Lightning and torch keep in every one."""
    return {key: value for key, value in vars(module).items() if key not in _INTERNAL}


def _contents(values: list[Any]) -> list[tuple[Any, Any]]:
    """All plain containers among some values, those in others too, arrays and generators, each with what it holds."""
    found: dict[int, tuple[Any, Any]] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if id(value) in found:
            continue
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            found[id(value)] = (value, value.detach().clone())
        elif isinstance(value, np.ndarray):
            found[id(value)] = (value, value.copy())
        elif isinstance(value, _GENERATORS):
            found[id(value)] = (value, _state_of(value))
        elif type(value) in _CONTAINERS:
            found[id(value)] = (value, copy.copy(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return list(found.values())


def _restore(contents: list[tuple[Any, Any]]) -> None:
    for value, content in contents:
        if isinstance(value, Tensor):
            with torch.no_grad():
                value.copy_(content)
        elif isinstance(value, np.ndarray):
            value[...] = content
        elif isinstance(value, _GENERATORS):
            _set_state(value, content)
        elif not _unchanged(value, content):
            value.clear()
            (value.extend if isinstance(value, (list, deque)) else value.update)(content)


def _unchanged(value: Any, content: Any) -> bool:
    """Whether a container holds the very same things in the same places."""
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return [*value] == [*content] and all(value[key] is content[key] for key in value)
    if isinstance(value, set):
        return bool(value == content)
    return all(new is old for new, old in zip(value, content, strict=True))


def _state_of(generator: Any) -> Any:
    """The state of a generator of random numbers, whoever made it."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state


_CONTAINERS = (list, deque, dict, defaultdict, OrderedDict, Counter, set)
_GENERATORS = (torch.Generator, random.Random, np.random.Generator)
