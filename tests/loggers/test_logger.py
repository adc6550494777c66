import json
import os
import subprocess
import sys

import pytest
import torch

from composefit.images import Image
from composefit.loggers import Logger


def test_a_logger_needs_log_metrics_and_nothing_else() -> None:
    class Kept(Logger):
        def __init__(self) -> None:
            self.rows: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.rows.append((step, metrics))

    kept = Kept()
    kept.log_hyperparams({"lr": 0.1})
    kept.log_metrics({"loss": 1.0}, 3)
    kept.log_image("fakes", Image(torch.rand(2, 2)), 3)
    kept.flush()
    kept.load_state_dict({**kept.state_dict(), "step": 3})
    kept.finalize("finished")
    assert kept.rows == [(3, {"loss": 1.0})]

    class Nothing(Logger):
        pass

    with pytest.raises(TypeError, match="log_metrics"):
        Nothing()  # type: ignore[abstract]


def test_packages_of_extras_are_imported_only_for_their_loggers() -> None:
    code = "import json, sys, composefit.loggers; print(json.dumps(list(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        stdout=subprocess.PIPE,
        check=True,
    )
    names = json.loads(found.stdout)
    assert "composefit.loggers.wandb" in names
    assert not {"tensorboard", "torch.utils.tensorboard", "wandb"} & set(names)
