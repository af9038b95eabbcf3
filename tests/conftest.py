"""What every test shares: a fixed seed and a deterministic profile of hypothesis."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# One thread in every process of the tests and in those they start: two processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

hypothesis.settings.register_profile("bsdp", derandomize=True, max_examples=25, deadline=None, database=None)
hypothesis.settings.load_profile("bsdp")


def pytest_configure(config: pytest.Config) -> None:
    """Excuse, by name, what torch warns of when a test does it on purpose."""
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel lengths:UserWarning")


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    """Start every test from the same random state and give the caller's back, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` takes a millisecond
        yield
