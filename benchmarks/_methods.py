"""What a comparison runs: the configuration of every method, with the network, data and epochs of the task in it.

A method is a configuration that trains and perhaps prunes. From a complete one only the method is taken: its optimizer,
its callbacks and the like. What would make two methods unequal comes from the task alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "configs" / "experiment"
PEERS = ROOT / "benchmarks" / "methods"
TASKS = ROOT / "benchmarks" / "tasks"
FINETUNE = "finetune"

_OF_THE_TASK = {
    "model": ("backbone", "weights", "num_classes", "head", "channels_last", "normalization"),
    "trainer": (
        *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "overfit_batches", "fast_dev_run"),
        *("limit_train_batches", "limit_val_batches", "limit_test_batches", "default_root_dir", "logger"),
        *("accelerator", "devices", "strategy", "precision"),
    ),
    "PruningReport": ("latency_batch_size", "latency_repeats", "latency_device"),
}
_SET_BY_COMPARE = {
    "trainer.max_epochs": "--epochs",
    "seed_everything": "--seeds",
    "name": "--output",
    "config": "--methods or --task",
}
# Callbacks that prune to a target, with what makes them do so whatever the accuracy.
_TO_TARGET: dict[str, dict[str, Any]] = {
    "IterativeBasisPruning": {"tolerance": None},
    "ChannelPruning": {"tolerance": None},
    "DoublePruning": {"tolerance": None},
    "TorchPruning": {},
    "LightningModelPruning": {},
}

Config = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One method, ready to run.

    Attributes:
        name: As it stands in the table.
        stages: One configuration for each fit; each but the first starts from the weights that the one before left.
        target: Share to remove, where it is not the configuration's own.
    """

    name: str
    stages: tuple[Config, ...]
    target: float | None = None

    @property
    def prunes(self) -> bool:
        """Whether its last fit is another than fine-tuning, so that a summary is expected."""
        return self.name.split("+")[-1] != FINETUNE

    @property
    def label(self) -> str:
        """Its name, with the target where several stand side by side."""
        return self.name if self.target is None else f"{self.name}@{self.target:g}"


def find(name: str, *folders: Path, option: str) -> Path:
    """Find a configuration by its name in one of the folders or by its path.

    Raises:
        ValueError: If there is none; the message lists the names.
    """
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Path(name)
        raise ValueError(f"`{option}`: there is no file {name!r}.")
    known = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"`{option}`: unknown {name!r}.{hint} Give one of {', '.join(known)}, or the path of a YAML file.")


def read_task(name: str, overrides: Mapping[str, Any], epochs: int | None) -> Config:
    """Read a task and put the overrides of the command line into it.

    Args:
        name: Name of a file in ``benchmarks/tasks``, or a path.
        overrides: Values by dotted name: ``data.batch_size``, ``model.backbone``, ``callbacks.PruningReport.plot``.
        epochs: Epochs of every run; None for those of the file.
    """
    path = find(name, TASKS, option="--task")
    task = _read(path)
    if missing := [key for key in ("model", "data", "trainer") if not isinstance(task.get(key), dict)]:
        raise ValueError(f"`--task`: {path} lacks the section {missing[0]!r}; see benchmarks/tasks/digits.yaml.")
    for key, value in overrides.items():
        _put(task, key, value)
    if epochs is not None:
        task["trainer"]["max_epochs"] = epochs
    given = task["trainer"].get("max_epochs")
    if not isinstance(given, int) or given < 1:
        raise ValueError(f"`--epochs` must be at least 1, got {given}: every method gets the same number.")
    return task


def _put(task: Config, key: str, value: Any) -> None:
    if key in _SET_BY_COMPARE:
        raise ValueError(f"`--{key}` is the same for all methods here: use `{_SET_BY_COMPARE[key]}`.")
    parts = key.split(".")
    if parts[0] not in ("model", "data", "trainer", "callbacks") or len(parts) < (3 if parts[0] == "callbacks" else 2):
        raise ValueError(
            f"unknown option `--{key}`. Beside those of --help there are --model.NAME, --data.NAME, --trainer.NAME and "
            "--callbacks.CLASS.NAME."
        )
    if parts[0] in ("model", "data") and parts[1] not in ("init_args", "class_path"):
        parts.insert(1, "init_args")
    place = task
    for part in parts[:-1]:
        place = place.setdefault(part, {})
    place[parts[-1]] = value


def build_method(name: str, task: Config) -> Method:
    """Put a task into the configuration of a method, or of several that follow each other (``finetune+basis``).

    The epochs are divided among the stages; the first ones get what does not divide evenly.
    """
    parts = name.split("+")
    epochs = task["trainer"]["max_epochs"]
    if epochs < len(parts):
        raise ValueError(f"`--epochs` {epochs} is too few for the {len(parts)} stages of {name!r}.")
    shares = [epochs // len(parts) + (i < epochs % len(parts)) for i in range(len(parts))]
    paths = [find(part, EXPERIMENTS, PEERS, option="--methods") for part in parts]
    stages = [compose(_read(path), task, epochs=share) for path, share in zip(paths, shares, strict=True)]
    method = Method("+".join(path.stem for path in paths), tuple(stages))
    for stage in stages:
        check_rounds(method.name, stage)
    return method


def build_methods(names: Sequence[str], task: Config, targets: Sequence[float] = ()) -> list[Method]:
    """All methods, fine-tuning first: the unpruned network with which the others are compared.

    Args:
        names: Names of the methods.
        task: From `read_task`.
        targets: Shares to remove, each with every method, whatever the accuracy; none for the methods' own settings.

    Raises:
        ValueError: If one is unknown or does not fit into the epochs, two have one name, or one has no target.
    """
    methods = [build_method(name, task) for name in [FINETUNE, *(name for name in names if name != FINETUNE)]]
    found = [method.name for method in methods]
    if twice := {name for name in found if found.count(name) > 1}:
        raise ValueError(f"`--methods`: {min(twice)!r} is there twice; a file's name is the method's name.")
    if not targets:
        return methods
    return [methods[0], *(at_target(method, target) for method in methods[1:] for target in targets)]


def at_target(method: Method, target: float) -> Method:
    """The same method with another target and no tolerance, so that it ends at that size.

    Where several fits prune one after another, each keeps the same share of what it gets.

    Raises:
        ValueError: If nothing in it prunes to a target.
    """
    stages = deepcopy(method.stages)
    pruning = [callback for stage in stages for callback in _callbacks(stage) if _kind(callback) in _TO_TARGET]
    if not pruning:
        raise ValueError(f"`--targets`: {method.name!r} has no target; those that have use {', '.join(_TO_TARGET)}.")
    share = 1.0 - (1.0 - target) ** (1.0 / len(pruning)) if len(pruning) > 1 else target
    for callback in pruning:
        callback["init_args"] |= {"target": share} | _TO_TARGET[_kind(callback)]
    return replace(method, stages=stages, target=target)


def compose(method: Config, task: Config, *, epochs: int) -> Config:
    """One complete configuration: what is the method's own from `method`, everything else from `task`."""
    composed = {key: deepcopy(value) for key, value in method.items() if key not in ("name", "seed_everything")}
    composed.pop("ckpt_path", None)
    composed["model"] = _model(composed.get("model", {}), task["model"])
    composed["data"] = _data(composed.get("data", {}), task["data"])
    own = {key: value for key, value in composed.get("trainer", {}).items() if key not in _OF_THE_TASK["trainer"]}
    composed["trainer"] = own | deepcopy(task["trainer"]) | {"max_epochs": epochs}
    wanted = task.get("callbacks", {})
    for callback in _callbacks(composed):
        kind = _kind(callback)
        own = callback.get("init_args") or {}
        own = {key: value for key, value in own.items() if key not in _OF_THE_TASK.get(kind, ())}
        callback["init_args"] = own | deepcopy(wanted.get(kind, {}))
    return composed


def _model(own: Config, task: Config) -> Config:
    """The task's network, with the method's training; a method that starts from random weights does so here, too."""
    given = own.get("init_args", {})
    wanted = deepcopy(task.get("init_args", {}))
    if str(given.get("weights")).lower() == "none" and "weights" in given:
        wanted = {key: value for key, value in wanted.items() if key != "head"} | {"weights": "none"}
    trained = {key: value for key, value in given.items() if key not in _OF_THE_TASK["model"]}
    return {"class_path": own.get("class_path", task["class_path"]), "init_args": trained | wanted}


def _data(own: Config, task: Config) -> Config:
    """The task's data; where the method's data module has a ``target`` beside other data, the task's is the target."""
    args = own.get("init_args", {})
    if isinstance(args.get("target"), dict) and "class_path" in args["target"]:
        return {**own, "init_args": {**args, "target": deepcopy(task)}}
    return deepcopy(task)


def _callbacks(config: Config) -> list[Config]:
    trainer = config["trainer"]
    return [*(trainer.get("callbacks") or []), *(trainer.get("callbacks+") or [])]


def _kind(callback: Config) -> str:
    return str(callback["class_path"]).rsplit(".", 1)[-1]


def check_rounds(method: str, config: Config) -> None:
    """Refuse, before anything runs, a schedule that the equal number of epochs has no room for."""
    epochs = config["trainer"]["max_epochs"]
    for callback in _callbacks(config):
        needed, parts, setting = _epochs_needed(callback["init_args"])
        if needed > epochs:
            kind = _kind(callback)
            raise ValueError(
                f"`--methods`: {method!r} cannot run in the {epochs} epochs that it has here: its {kind} needs "
                f"{needed} ({parts}). Raise `--epochs`, or change `--callbacks.{kind}.{setting}`."
            )


def _epochs_needed(args: Config) -> tuple[int, str, str]:
    """How many epochs a pruning callback takes at least, the parts of that, and a setting that it depends on."""
    if isinstance(gates := args.get("gate_epochs"), int):
        return gates + 1, f"{gates} with gates, 1 without", "gate_epochs"
    warmup, search = args.get("warmup_epochs"), args.get("search_epochs")
    if isinstance(warmup, int) and isinstance(search, int):
        search = 0 if args.get("structure") else search
        return warmup + search + 1, f"{warmup} + {search} of search + 1", "search_epochs"
    rounds, each = args.get("rounds"), args.get("epochs_per_round")
    if isinstance(warmup, int) and isinstance(rounds, int) and isinstance(each, int):
        return warmup + rounds * each, f"{warmup} + {rounds} x {each}", "rounds"
    return 0, "", ""


def _read(path: Path) -> Config:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict) or not {"model", "trainer"} & content.keys():
        raise ValueError(f"{path} is not a configuration of a run: it has neither `model` nor `trainer`.")
    return content
