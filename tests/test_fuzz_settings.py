"""Random values for every setting of our callbacks, data modules and task: accepted where allowed, else explained."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule

from bsdp import cli

Rule = Callable[[Any], bool]


def whole(least: int, *, optional: bool = False) -> Rule:
    return lambda v: (v is None and optional) or (type(v) is int and v >= least)


def number(low: float, high: float, *, open_end: bool = True, optional: bool = False, zero: bool = False) -> Rule:
    def rule(v: Any) -> bool:
        inside = type(v) in (int, float) and low <= v <= high
        return (v is None and optional) or (inside and (zero or v > low) and (not open_end or v < high))

    return rule


def one_of(*names: str) -> Rule:
    return lambda v: v in names


def anything(v: Any) -> bool:
    return True


def flag(v: Any) -> bool:
    return type(v) is bool or v is None  # null counts as false


def texts(v: Any) -> bool:
    return v is None or (isinstance(v, list) and all(isinstance(text, str) for text in v))


def channels(v: Any) -> bool:
    if v is None:
        return True
    good = set(v) == {"mean", "std"} and all(len(n) == 3 and all(map(math.isfinite, n)) for n in v.values())
    return good and min(v["std"]) > 0


IMAGES: dict[str, Rule] = {
    "image_size": whole(1, optional=True),
    "batch_size": whole(1),
    "num_workers": whole(0),
    "val_fraction": number(0, 1),
    "split_seed": whole(0),
    "samples_per_class": whole(1, optional=True),
    "augment": one_of("none", "crop", "crop_flip"),
    "normalization": channels,
    "download": flag,
    "drop_last": flag,
    "seed": whole(0, optional=True),
}
RATE = number(0, math.inf, optional=True)
# What each setting allows. Values that are accepted must be allowed, and a refusal must name the setting.
SETTINGS: dict[tuple[str, str], dict[str, Rule]] = {
    ("callback", "bsdp.callbacks.IterativeBasisPruning"): {
        "target": number(0, 1),
        "target_kind": one_of("params", "macs", "bases"),
        "rounds": whole(1, optional=True),
        "schedule": one_of("geometric", "cubic", "constant"),
        "warmup_epochs": whole(1),  # 0 goes only with other settings
        "epochs_per_round": whole(1),
        "importance": one_of(
            "mean_square", "mean_abs", "fisher", "second_order", "energy", "magnitude", "sigma_energy"
        ),
        "score_momentum": number(0, 1, zero=True),
        "distillation": number(0, 1, open_end=False, zero=True),
        "recalibration_batches": whole(0),
        "rebase": one_of("auto", "never", "warmup", "every_round"),
        "sparsifier": one_of("none", "l1"),
        "curvature_batches": whole(1),
        "ranking": one_of("importance", "per_cost", "hull"),
        "tolerance": number(0, math.inf, open_end=False, optional=True, zero=True),
        "monitor": anything,
        "mode": one_of("max", "min"),
        "patience_rounds": whole(1),
        "min_rank": whole(1),
        "max_layer_ratio": number(0, 1),
        "mean_to_bias": flag,
        "restore_best": flag,
        "save_pruned": flag,
    },
    ("callback", "bsdp.callbacks.BasisDecomposition"): {
        "include": texts,
        "exclude": texts,
        "trainable": texts,
        "metric": one_of("euclidean", "activation"),
        "calibration_batches": whole(1),
        "train": one_of("scales", "weights"),
        "batch_norm": lambda v: v in (None, "frozen", "stats", "affine", "all"),
        "train_bias": flag,
        "centred": flag,
    },
    ("callback", "bsdp.callbacks.PruningReport"): {
        "latency_batch_size": whole(1),
        "latency_repeats": whole(0),
        "plot": flag,
    },
    ("data", "bsdp.datamodules.DigitsDataModule"): IMAGES,
    ("data", "bsdp.datamodules.ImageFolderDataModule"): {**IMAGES, "min_crop": number(0, 1, open_end=False)},
    ("model", "bsdp.task.TransferTask"): {
        "num_classes": whole(2, optional=True),
        "head": one_of("original", "pretrained"),  # of ResNet-20
        "head_lr": RATE,
        "scale_lr": RATE,
        "label_smoothing": number(0, 1, zero=True),
        "lr_scheduler": one_of("constant", "cosine", "onecycle"),
        "lr_interval": one_of("step", "epoch"),
        "normalization": channels,
        "channels_last": flag,
    },
}
SLOTS = [(part, path, key) for (part, path), rules in SETTINGS.items() for key in rules]
CHOICES = ["none", "crop", "params", "cubic", "hull", "max", "epoch", "frozen", "cosine", "original", "energy", "macs"]
THREE = st.lists(st.floats(-1, 3, width=16) | st.sampled_from([math.nan, math.inf]), min_size=2, max_size=3)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(-0.5, 1.5, width=16),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0, 1e30]),
    st.sampled_from([*CHOICES, "", "7", "0.5", "null", "1e3", "~", "a.b", "\u00e9", "x" * 200, "../x"]),
    st.lists(st.integers(0, 3) | st.sampled_from(["a", "b*"]), max_size=3),
    st.fixed_dictionaries({"mean": THREE, "std": THREE}) | st.dictionaries(st.text(max_size=3), THREE, max_size=2),
)


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    """What the command line parses the three kinds of our classes with."""
    parser = ArgumentParser(exit_on_error=False)
    for kind, name in ((Callback, "callback"), (LightningDataModule, "data"), (LightningModule, "model")):
        parser.add_subclass_arguments(kind, name, required=False)
    return parser


def build(parser: ArgumentParser, part: str, path: str, options: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Read settings as from a YAML file; gives what was understood, and the message if they are refused."""
    more = {"weights": "none"} if part == "model" else {}
    text = yaml.safe_dump({part: {"class_path": path, "init_args": {**more, **options}}})
    try:
        config = parser.parse_string(text)
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name of older releases
        instantiate(config)
    except Exception as error:
        message = cli._message_for_users(error)
        assert message is not None, f"{type(error).__name__}: {error}"
        return {}, message
    return config[part].init_args.as_dict(), None


@settings(max_examples=200)
@given(st.sampled_from(SLOTS), VALUES)
@example(SLOTS[0], 0.5)
@example(("model", "bsdp.task.TransferTask", "lr_scheduler"), {})
def test_a_setting_is_accepted_where_it_is_allowed_and_else_explained(
    parser: ArgumentParser, slot: tuple[str, str, str], value: Any
) -> None:
    accepted_or_explained(parser, slot, value)


@pytest.mark.slow
@settings(max_examples=1000)
@given(st.sampled_from(SLOTS), VALUES)
def test_many_settings_are_accepted_where_they_are_allowed_and_else_explained(
    parser: ArgumentParser, slot: tuple[str, str, str], value: Any
) -> None:
    accepted_or_explained(parser, slot, value)


def accepted_or_explained(parser: ArgumentParser, slot: tuple[str, str, str], value: Any) -> None:
    """A value is allowed by the rule of its setting, or the refusal names the setting."""
    part, path, key = slot
    rule = SETTINGS[part, path][key]
    understood, message = build(parser, part, path, {key: value})
    if message is None:
        assert rule(understood[key]), f"{key}={understood[key]!r} was accepted"
        return
    assert key in message and len(message) < 1500
    assert re.match(r"[^\n]+$", message), message
    if type(value) in (int, float) and rule not in (anything, channels):
        assert not rule(value), message


@pytest.mark.parametrize("part_and_path", SETTINGS, ids=lambda key: key[1].rpartition(".")[2])
def test_every_setting_that_is_fuzzed_exists_and_its_default_is_allowed(
    parser: ArgumentParser, part_and_path: tuple[str, str]
) -> None:
    understood, message = build(parser, *part_and_path, {})
    assert message is None
    rules = SETTINGS[part_and_path]
    assert [key for key, rule in rules.items() if not rule(understood[key])] == []


@given(st.text("abcdefghij_", min_size=1, max_size=8), st.sampled_from(sorted(SETTINGS)))
def test_settings_that_do_not_exist_are_refused_by_name(
    parser: ArgumentParser, key: str, part_and_path: tuple[str, str]
) -> None:
    _, message = build(parser, *part_and_path, {key: 1})
    assert message is not None and key in message and "\n" not in message
