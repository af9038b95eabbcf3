"""The names that `import bsdp` promises."""

import inspect
import re
from types import ModuleType

import pytest

import bsdp
import bsdp.layers

ALL = list(bsdp.__all__)


def imported_names(module: ModuleType) -> set[str]:
    """Public names of a package that are no modules."""
    return {n for n, v in vars(module).items() if not n.startswith("_") and not inspect.ismodule(v)}


def test_all_is_complete_and_sorted() -> None:
    assert sorted(ALL) == ALL
    assert len(set(ALL)) == len(ALL)
    assert imported_names(bsdp) == set(ALL)


def test_the_documented_names_are_there() -> None:
    promised = {
        *("decompose", "fold", "describe", "save", "load", "prune", "select", "freeze", "rebuild", "load_checkpoint"),
        *("ModelStats", "Decomposition", "PruningPlan", "ScoreAccumulator", "FeatureStatistics"),
        *("BasisPair", "BasisScalingConv", "measure_cost", "measure_latency", "kept_share"),
    }
    assert promised <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_every_name_is_documented_and_ours(name: str) -> None:
    value = getattr(bsdp, name)
    assert value.__module__.startswith("bsdp.")
    document = inspect.getdoc(value) or ""
    assert len(document) > 20
    assert document.splitlines()[0].endswith((".", "?", "``"))
    assert not document.startswith(f"{name}("), "a dataclass without a docstring of its own"


def parameters_of(value: object) -> set[str]:
    function = value.__init__ if inspect.isclass(value) else value
    return {p for p in inspect.signature(function).parameters if p != "self"}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ALL)
def test_every_argument_is_documented(name: str) -> None:
    value = getattr(bsdp, name)
    document = inspect.getdoc(value) or ""
    section = re.search(r"^(Args|Attributes):\n((?:    .*\n?|\n)*)", document, re.MULTILINE)
    documented = set(re.findall(r"^    (\w+):", section.group(2), re.MULTILINE)) if section else set()
    arguments = {p for p in parameters_of(value) if p != "factory"}
    if section or len(arguments) > 1:
        assert documented >= arguments


@pytest.mark.parametrize("name", [n for n in ALL if inspect.isclass(getattr(bsdp, n))])
def test_public_methods_are_documented(name: str) -> None:
    for method, function in vars(getattr(bsdp, name)).items():
        if not method.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
            assert inspect.getdoc(function), f"{name}.{method}"


def test_the_package_is_typed() -> None:
    from importlib.resources import files

    assert files("bsdp").joinpath("py.typed").is_file()
    for name in ALL:
        value = getattr(bsdp, name)
        function = value.__init__ if inspect.isclass(value) else value
        signature = inspect.signature(function)
        for parameter in signature.parameters.values():
            assert parameter.name == "self" or parameter.annotation is not inspect.Parameter.empty, (
                f"{name}: {parameter}"
            )
        assert signature.return_annotation is not inspect.Signature.empty, name
