"""What is said of a schedule that the trainer has no time for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_epochs": -1, "max_steps": 3}, r"stops after 1 \(`max_steps=3`\): raise `max_steps` or"),
        ({"max_epochs": 5, "max_steps": 3}, r"stops after 1 \(`max_steps=3`\): raise `max_steps` or"),
        ({"max_epochs": 1}, r"stops after 1 \(`max_epochs=1`\): raise `max_epochs` or"),
        (
            {"max_epochs": 1, "max_steps": 3},
            r"`max_epochs=1`, `max_steps=3`\): raise `max_epochs` and `max_steps` or",
        ),
    ],
)
def test_the_limit_that_is_too_low_is_named(limits: dict[str, Any], message: str, tmp_path: Path) -> None:
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.5, tolerance=None, rounds=1, save_pruned=False)
    trainer = make_trainer(tmp_path, [pruning, BasisDecomposition()], **limits)
    with pytest.raises(ValueError, match=message):
        trainer.fit(Classifier(), datamodule=Stripes())
