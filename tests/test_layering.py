"""Who imports whom. Every rule is one function of sources, and a second test shows that it can fail."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Loaded by `import bsdp` only when a function that needs it is called.
LATE = ("lightning", "torchvision", "safetensors", "fvcore", "matplotlib", "rich", "sklearn", "wandb", "timm")
# The files of bsdp/ that may know Lightning and what is built on it; the rest is the core.
UPPER = (
    *("bsdp.task", "bsdp.cli", "bsdp.command_parser", "bsdp.trainer_cli", "bsdp.runs", "bsdp.resume"),
    "bsdp.compress_command",
    *("bsdp.callbacks", "bsdp.datamodules"),
)
TRAINERS = ("lightning", "pytorch_lightning", "lightning_fabric", "jsonargparse", "torchmetrics")
SKIPPED_FOLDERS = {"build", "dist", "logs"}


def loaded_after(*statements: str, names: tuple[str, ...] = (*LATE, "torch")) -> list[set[str]]:
    """Which of `names` a fresh interpreter has loaded after each of some statements, one after another."""
    look = f"import sys; print('loaded', *sorted(set({names!r}) & sys.modules.keys()))"
    code = "\n".join(f"{statement}\n{look}" for statement in statements)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return [set(line.split()[1:]) for line in result.stdout.splitlines() if line.split()[:1] == ["loaded"]]


def imports_of(source: str, package: str) -> Iterator[str]:
    """Absolute names of all modules that a source imports anywhere, `from a import b` as ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def begins_with(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def core_breach(source: str) -> list[str]:
    """Imports that the core must not have: trainers and what is built on them."""
    return [name for name in imports_of(source, "bsdp") if begins_with(name, (*UPPER, *TRAINERS))]


def callback_breach(source: str) -> list[str]:
    """Imports of one callback file by another; what callbacks share is in files that begin with an underscore."""
    ours = [name for name in imports_of(source, "bsdp.callbacks") if begins_with(name, ("bsdp.callbacks",))]
    public = [name for name in ours if not name.removeprefix("bsdp.callbacks.").startswith("_")]
    upward = tuple(name for name in UPPER if name != "bsdp.callbacks")
    return public + [name for name in imports_of(source, "bsdp.callbacks") if begins_with(name, upward)]


def datamodule_breach(source: str) -> list[str]:
    """Imports of anything of ours but the other data modules."""
    names = imports_of(source, "bsdp.datamodules")
    return [n for n in names if begins_with(n, ("bsdp",)) and not begins_with(n, ("bsdp.datamodules",))]


def folder_breach(source: str) -> list[str]:
    """Imports of the folders by their own names, which a user's project may have, too."""
    names = imports_of(source, "somewhere.in.a.package")
    return [name for name in names if begins_with(name, ("callbacks", "datamodules"))]


def early_imports(source: str) -> list[str]:
    """Imports, outside of functions, of what callbacks load when they need it; those for type checkers do not count."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if typing or isinstance(node, ast.FunctionDef):
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
    late = ("wandb", "matplotlib")
    return [name for name in imports_of(ast.unparse(tree), "bsdp.callbacks") if begins_with(name, late)]


def core_files() -> list[Path]:
    return [p for p in sorted((ROOT / "bsdp").glob("*.py")) if f"bsdp.{p.stem}" not in UPPER]


def all_files() -> list[Path]:
    """Every Python file of the repository, symlinked folders once."""
    found = []
    for folder, folders, files in os.walk(ROOT):  # does not follow the links
        folders[:] = [n for n in folders if not n.startswith(".") and n not in SKIPPED_FOLDERS and ".egg-info" not in n]
        found += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith(".")]
    return sorted(found)


def breaches(files: list[Path], rule: object) -> dict[str, list[str]]:
    found = {str(path.relative_to(ROOT)): rule(path.read_text()) for path in files}  # type: ignore[operator]
    return {name: names for name, names in found.items() if names}


def test_what_is_loaded_by_and_by() -> None:
    core, overview, reports = loaded_after(
        "import bsdp",
        "from bsdp.cli import main; main(['--help'])",
        "import bsdp.plots, bsdp.report, bsdp.report_table, bsdp.artifacts",
    )
    assert core == {"torch"}
    assert "lightning" not in overview
    assert not {"matplotlib", "rich", "lightning", "fvcore"} & reports


@pytest.mark.slow
def test_callbacks_load_wandb_late() -> None:
    (callbacks,) = loaded_after("from bsdp import callbacks; callbacks.WandbPruningCurves(), callbacks.PruningReport()")
    assert "lightning" in callbacks and "wandb" not in callbacks


def test_callbacks_import_wandb_and_plots_in_functions_only() -> None:
    assert breaches(sorted((ROOT / "callbacks").glob("*.py")), early_imports) == {}
    assert early_imports("import wandb") == ["wandb"] and early_imports("if x:\n    from wandb import a") == ["wandb.a"]
    assert early_imports("import torch\ndef f():\n    import wandb") == []


def test_the_look_into_a_fresh_interpreter_can_fail() -> None:
    names = ("rich", "json", "torch")
    assert loaded_after("import rich", "import json", names=names) == [{"rich"}, {"rich", "json"}]


def test_the_core_knows_no_trainer() -> None:
    assert len(core_files()) > 15
    assert breaches(core_files(), core_breach) == {}


def test_callbacks_do_not_know_each_other() -> None:
    files = [p for p in sorted((ROOT / "callbacks").glob("*.py")) if p.name != "__init__.py"]
    assert breaches(files, callback_breach) == {}


def test_data_modules_know_nothing_of_ours() -> None:
    assert breaches(sorted((ROOT / "datamodules").glob("*.py")), datamodule_breach) == {}


def test_nothing_imports_the_folders_by_their_own_names() -> None:
    files = all_files()
    assert ROOT / "train.py" in files
    assert Path(__file__) in files
    assert breaches(files, folder_breach) == {}


@pytest.mark.parametrize(
    ("rule", "source", "expected"),
    [
        (core_breach, "import lightning.pytorch as pl", ["lightning.pytorch"]),
        (core_breach, "def f():\n    from bsdp.callbacks import A", ["bsdp.callbacks.A"]),
        (core_breach, "from bsdp import task", ["bsdp.task"]),
        (core_breach, "from .callbacks import A", ["bsdp.callbacks.A"]),
        (core_breach, "from . import cli", ["bsdp.cli"]),
        (core_breach, "from torchmetrics import Accuracy", ["torchmetrics.Accuracy"]),
        (core_breach, "import torchvision\nfrom bsdp.layers import BasisPair\nimport taskset", []),
        (callback_breach, "from bsdp.callbacks.pruning import A", ["bsdp.callbacks.pruning.A"]),
        (callback_breach, "from bsdp.callbacks import A", ["bsdp.callbacks.A"]),
        (callback_breach, "from .pruning import A", ["bsdp.callbacks.pruning.A"]),
        (callback_breach, "from bsdp.task import TransferTask", ["bsdp.task.TransferTask"]),
        (callback_breach, "from bsdp.callbacks._shared import a\nfrom bsdp import prune\nimport lightning", []),
        (datamodule_breach, "from bsdp import prune", ["bsdp.prune"]),
        (datamodule_breach, "import bsdp.backbones", ["bsdp.backbones"]),
        (datamodule_breach, "from bsdp.datamodules.base import Base\nfrom ._paths import find\nimport torch", []),
        (folder_breach, "import callbacks", ["callbacks"]),
        (folder_breach, "from callbacks.pruning import A", ["callbacks.pruning.A"]),
        (folder_breach, "if True:\n    import datamodules.cifar as cifar", ["datamodules.cifar"]),
        (folder_breach, "from bsdp.callbacks import A\nfrom .callbacks import B\nx = 'import callbacks'", []),
    ],
)
def test_every_rule_can_fail(rule: object, source: str, expected: list[str]) -> None:
    assert rule(source) == expected  # type: ignore[operator]
