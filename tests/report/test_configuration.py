import os
import sys
from enum import Enum
from pathlib import Path

import pytest
import torch
from torch import nn

from composefit import OptimizerConfig, SingleDevice, report
from composefit.optimizers import read_optimizers
from composefit.report.redaction import HIDDEN, command_line


def test_optimizers_are_shown_with_their_settings_schedulers_and_clipping() -> None:
    net = nn.Linear(3, 2)
    adam = torch.optim.Adam(net.parameters(), lr=0.1, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.StepLR(adam, step_size=1)
    adam.step()
    schedule.step()  # the learning rate is now another
    named = read_optimizers({"net": OptimizerConfig(adam, schedule, gradient_clip_val=1.5)}, net)
    found = report.configuration({}, SingleDevice(), named)["optimizers"]
    assert found == {
        "net": {
            "class": "Adam",
            "parameters": 8,
            "lr": 0.1,
            "betas": [0.5, 0.9],
            "eps": 1e-8,
            "schedulers": ["StepLR, every epoch"],
            "gradient clipping": "norm at most 1.5",
        }
    }


def test_settings_that_differ_between_groups_are_listed() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    groups = [{"params": net[0].parameters(), "lr": 1.0}, {"params": net[1].parameters()}]
    named = read_optimizers(torch.optim.SGD(groups, lr=0.5, momentum=0.9), net)
    (found,) = report.configuration({}, SingleDevice(), named)["optimizers"].values()
    assert (found["lr"], found["momentum"], found["parameters"]) == ([1.0, 0.5], 0.9, 11)


def test_arguments_strategy_and_hyperparameters_have_a_place_each() -> None:
    arguments = {"max_epochs": 3, "strategy": "single"}
    found = report.configuration(arguments, SingleDevice("cpu"), {}, {"width": 4})
    assert found["trainer"] == {"max_epochs": 3}
    assert found["strategy"] == {"class": "SingleDevice", "device": "cpu", "lanes": 1}
    assert found["hyperparameters"] == {"width": 4}
    assert "optimizers" not in found


def test_anything_is_described_without_addresses_in_memory() -> None:
    class Colour(Enum):
        RED = 1

    class Thing:
        def __init__(self) -> None:
            self.size, self._hidden, self.inner = 3, 4, object()

    described = report.describe(
        {
            "thing": Thing(),
            "function": os.path.join,
            "class": Thing,
            "path": Path("a/b"),
            "tensor": torch.zeros(2, 3),
            "scalar": torch.tensor(2.5),
            "dtype": torch.bfloat16,
            "set": {1},
            "bytes": b"xyz",
            1: None,
        }
    )
    assert described["thing"] == "Thing(size=3)"
    assert described["function"] == "join"
    assert described["class"].endswith("Thing")
    assert described["path"] == str(Path("a/b"))
    assert (described["tensor"], described["scalar"]) == ("tensor (2, 3)", 2.5)
    assert (described["dtype"], described["set"], described["1"]) == ("torch.bfloat16", [1], None)
    assert "0x" not in repr(described) + repr(report.describe(Colour.RED))


def test_the_environment_tells_versions_and_the_command_and_no_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret-1")
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "0.1", "--token", "s3cret-2"])
    found = report.environment()
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["command"].endswith(f"train.py --lr 0.1 --token {HIDDEN}")
    assert "s3cret" not in repr(found)


@pytest.mark.parametrize(
    "given",
    [
        ["--password", "s3cret"],
        ["--password=s3cret"],
        ["wandb.api_key=s3cret"],
        ["+trainer.logger.apiKey=s3cret"],
        ["-token", "s3cret", "--lr", "1"],
        ["--hf-token", "s3cret"],
        ["--url", "db://me:s3cret@host/x"],
        ["--url=db://s3cret@host/x"],
    ],
)
def test_secrets_on_a_command_line_are_hidden(given: list[str]) -> None:
    assert "s3cret" not in command_line(["train.py", *given])


def test_what_only_looks_like_a_secret_is_shown() -> None:
    arguments = ["train.py", "--tokenizer", "bpe", "--max-tokens=5", "monkey=3", "--key-dim", "64"]
    shown = command_line(arguments)
    assert "bpe" in shown and "--max-tokens=5" in shown and "monkey=3" in shown
