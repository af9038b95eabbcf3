"""What every test shares: a fixed seed, one thread, a small heap, and a deterministic profile of hypothesis."""

import gc
import os
from collections.abc import Iterator

import pytest

# One thread in every process of the tests and in those they start: two processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Excuse, by name, what torch warns of when a test does it on purpose; prepare the process that runs the tests."""
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel lengths:UserWarning")
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # only hands the tests out: what it would import takes it 6 s, and the others wait

    import hypothesis
    import torch

    torch.set_num_threads(1)
    hypothesis.settings.register_profile("bsdp", derandomize=True, max_examples=25, deadline=None, database=None)
    hypothesis.settings.load_profile("bsdp")


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what the imports made: a look at all of it takes it a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let all of it go in the usual way: libraries tell at length of what is left over."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    """Start every test from the same random state and give the caller's back, whatever ran before."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` takes a millisecond
        yield
