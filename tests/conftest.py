"""What holds for every test: no traces between tests, and a GPU only where there is one."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

# Tests run side by side, so each process keeps to one core. Subprocesses inherit it; it has to be
# said before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

# Not tests: a project of its own (run by test_packaging.py) and a command (`make mutants`).
collect_ignore = ["downstream", "mutants"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that draws without a seed of its own draws the same in every run and order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a trainer writes by default goes below the working directory: not into the project's."""
    monkeypatch.chdir(tmp_path)


def _settings() -> dict[str, object]:
    return {
        "number of threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast on the CPU": torch.is_autocast_enabled("cpu"),
        "anomaly detection": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.get_deterministic_debug_mode(),
    }


@pytest.fixture(autouse=True)
def _settings_put_back() -> Iterator[None]:
    """After a test, torch's global settings are as before: whoever changes one puts it back."""
    before = _settings()
    yield
    after = _settings()
    # One test's trace is that test's failure alone.
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled("cpu", False)
    torch.autograd.set_detect_anomaly(False)
    torch.set_deterministic_debug_mode(0)
    assert after == before, "a setting of torch was left changed"
