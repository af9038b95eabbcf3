"""The ideas of an ablation: what each one sets, and the methods that have it alone, leave it out or put it instead.

Two frames. ``plain`` is basis pruning without any of them: orthonormal bases that stay fixed, scaling factors, batch
norms and head train. ``all`` has every idea that goes with the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from benchmarks._methods import FINETUNE, Config, Method, at_target, build_method, check_rounds, compose

PLAIN, ALL = "plain", "all"
WARMUP = "the epochs of the warm-up"  # stands for their number
Settings = Mapping[str, Any]

_OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.0001}}
_OPTIMIZER_OF_WEIGHTS = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "weight_decay": 0.01}}
_PLAIN: Settings = {
    "model.optimizer": _OPTIMIZER,
    "model.lr_scheduler": "cosine",
    "BasisDecomposition.metric": "euclidean",
    "BasisDecomposition.train": "scales",
    "BasisDecomposition.batch_norm": "all",
    "IterativeBasisPruning.importance": "mean_square",
    "IterativeBasisPruning.ranking": "importance",
    "IterativeBasisPruning.mean_to_bias": False,
    "IterativeBasisPruning.rebase": "never",
    "IterativeBasisPruning.schedule": "geometric",
    "IterativeBasisPruning.epochs_per_round": 1,
}
_CHECKPOINT = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"monitor": "val_accuracy", "mode": "max"},
}


@dataclass(frozen=True)
class Idea:
    """One idea.

    Attributes:
        name: Part of the names of its methods.
        text: In words.
        settings: What it sets, by ``model.NAME`` or ``CALLBACK.NAME``.
        in_all: Whether it is one of all ideas, and so left out of them; else it is added to them.
        instead_of: The ideas that give way where it is added to all.
        beside: What it sets on top where it is added to all, so that it differs from what gave way in one thing only.
    """

    name: str
    text: str
    settings: Settings
    in_all: bool = False
    instead_of: tuple[str, ...] = ()
    beside: Settings = field(default_factory=dict)


IDEAS = (
    Idea(
        "activation",
        "bases by the power of what they put out",
        {"BasisDecomposition.metric": "activation"},
        instead_of=("centred",),
    ),
    Idea(
        "centred",
        "bases by the variance of what they put out",
        {"BasisDecomposition.metric": "activation", "BasisDecomposition.centred": True},
        in_all=True,
    ),
    Idea(
        "kfac",
        "bases by what errors do to the loss, chosen in the warm-up",
        {"IterativeBasisPruning.rebase": "warmup", "IterativeBasisPruning.metric": "kfac"},
        instead_of=("centred",),
        beside={"IterativeBasisPruning.centred": True},
    ),
    Idea(
        "rebase",
        "bases chosen anew before every cut, by the power of what they put out",
        {"IterativeBasisPruning.rebase": "every_round", "IterativeBasisPruning.metric": "activation"},
        beside={"IterativeBasisPruning.centred": True},
    ),
    Idea(
        "weights",
        "all weights train, at a tenth of the learning rate",
        {"BasisDecomposition.train": "weights", "model.optimizer": _OPTIMIZER_OF_WEIGHTS},
        in_all=True,
    ),
    Idea("per_cost", "ranking by importance over cost", {"IterativeBasisPruning.ranking": "per_cost"}, in_all=True),
    Idea(
        "hull",
        "ranking on the convex hull of importance and cost",
        {"IterativeBasisPruning.ranking": "hull"},
        instead_of=("per_cost",),
    ),
    Idea("mean_to_bias", "means of what goes into biases", {"IterativeBasisPruning.mean_to_bias": True}, in_all=True),
    Idea("cubic", "much is cut at first, little at last", {"IterativeBasisPruning.schedule": "cubic"}, in_all=True),
    Idea("fisher", "scores by single examples", {"IterativeBasisPruning.importance": "fisher"}, in_all=True),
    Idea(
        "second_order",
        "scores with the curvature",
        {"IterativeBasisPruning.importance": "second_order"},
        instead_of=("fisher",),
    ),
    Idea("momentum", "scores of earlier rounds count, too", {"IterativeBasisPruning.score_momentum": 0.5}),
    Idea(
        "distillation", "learning from the unpruned network", {"IterativeBasisPruning.distillation": 0.5}, in_all=True
    ),
    Idea("restart", "learning rate to 0 in the warm-up, then anew", {"model.lr_restart_epoch": WARMUP}, in_all=True),
    # Batch norms train on after a cut anyway, so it is none of `all`.
    Idea("recalibration", "batch norms recomputed after a cut", {"IterativeBasisPruning.recalibration_batches": 16}),
    Idea(
        "l1",
        "scaling factors made small before a cut",
        {"IterativeBasisPruning.sparsifier": "l1", "IterativeBasisPruning.sparsity_weight": 0.0001},
    ),
)


@dataclass(frozen=True)
class Variant:
    """A frame with at most one idea more or less.

    Attributes:
        name: Name of the method.
        frame: `PLAIN` or `ALL`.
        change: What is different from the frame, in words; empty for the frame itself.
        settings: All that it sets.
        idea: The idea that makes the difference.
    """

    name: str
    frame: str
    change: str
    settings: Settings
    idea: Idea | None = None


def variants() -> list[Variant]:
    """All of them: a frame, then each idea in it, the plain frame first."""
    found = [Variant(PLAIN, PLAIN, "", _PLAIN)]
    found += [Variant(f"alone_{i.name}", PLAIN, f"with {i.name}", {**_PLAIN, **i.settings}, i) for i in IDEAS]
    found.append(Variant(ALL, ALL, "", _all_ideas()))
    for idea in IDEAS:
        if idea.in_all:
            left = _all_ideas(without=(idea.name,))
            found.append(Variant(f"without_{idea.name}", ALL, f"without {idea.name}", left, idea))
            continue
        settings = {**_all_ideas(without=idea.instead_of), **idea.settings, **idea.beside}
        instead = f" instead of {' and '.join(idea.instead_of)}" if idea.instead_of else ""
        found.append(Variant(f"with_{idea.name}", ALL, f"with {idea.name}{instead}", settings, idea))
    return found


def _all_ideas(without: Sequence[str] = ()) -> dict[str, Any]:
    settings = dict(_PLAIN)
    for idea in IDEAS:
        if idea.in_all and idea.name not in without:
            settings |= idea.settings
    return settings


def ablation_methods(task: Config, *, target: float, names: Sequence[str] = ()) -> list[Method]:
    """The methods of an ablation, ready to run: fine-tuning, the frames, and the variants that are asked for.

    Args:
        task: From `read_task`.
        target: Share of the parameters that every variant removes, whatever the accuracy.
        names: Names of variants; none for all.

    Raises:
        ValueError: If a name is unknown, the schedule does not fit, or a variant is the same as its frame.
    """
    known = {variant.name: variant for variant in variants()}
    if unknown := [name for name in names if name not in (*known, FINETUNE)]:
        raise ValueError(f"`--methods`: unknown {unknown[0]!r}; give some of {', '.join(known)}.")
    wanted = [v for v in known.values() if not names or v.name in names or v.idea is None]
    made = {variant.name: _method(variant, task, target=target) for variant in wanted}
    for variant in wanted:
        if variant.idea is not None and made[variant.name].stages == made[variant.frame].stages:
            raise ValueError(
                f"{variant.name!r} would be the same as {variant.frame!r}, for an option `--callbacks.CLASS.NAME` or "
                f"`--model.NAME` sets for all what the idea sets ({', '.join(variant.idea.settings)}): leave the "
                "option out, or the idea by `--methods`."
            )
    return [build_method(FINETUNE, task), *made.values()]


def _method(variant: Variant, task: Config, *, target: float) -> Method:
    config = compose(
        _config(variant.settings, task["trainer"]["max_epochs"]), task, epochs=task["trainer"]["max_epochs"]
    )
    pruning = config["trainer"]["callbacks"][-1]["init_args"]
    if config["model"]["init_args"].get("lr_restart_epoch") == WARMUP:
        config["model"]["init_args"]["lr_restart_epoch"] = pruning["warmup_epochs"]
    check_rounds(variant.name, config)
    return at_target(Method(variant.name, (config,)), target)


def _config(settings: Settings, epochs: int) -> Config:
    """The configuration of a run but for network and data; the rest of the epochs trains the final structure."""
    warmup = max(2, round(0.3 * epochs))  # two at least: one for head and batch norms, one for scores
    rounds = max(1, min(6, (epochs - warmup) // 2))
    sections: dict[str, Config] = {
        "model": {},
        "BasisDecomposition": {},
        "IterativeBasisPruning": {"rounds": rounds, "warmup_epochs": warmup},
    }
    for key, value in settings.items():
        section, name = key.split(".")
        sections[section][name] = deepcopy(value)
    model = sections.pop("model")
    callbacks = [{"class_path": f"bsdp.callbacks.{kind}", "init_args": args} for kind, args in sections.items()]
    return {"model": {"init_args": model}, "trainer": {"callbacks": [deepcopy(_CHECKPOINT), *callbacks]}}
