import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from composefit.callbacks import ModelSummary


class GAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(8, 100), nn.Linear(100, 16))  # 900 + 1616
        self.critic = nn.Linear(16, 1, dtype=torch.float64)  # 17


def named(optimizer: torch.optim.Optimizer) -> Any:
    return SimpleNamespace(
        optimizer=optimizer,
        parameters=lambda: [p for group in optimizer.param_groups for p in group["params"]],
    )


def rows(console: Any) -> list[list[str]]:
    return [re.split(r" {2,}", line.strip()) for line in console.file.getvalue().splitlines()]


def test_children_are_listed_with_their_sizes(make_trainer, pipe):
    gan = GAN()
    gan.generator[0].requires_grad_(False)
    ModelSummary(console=pipe).on_fit_start(make_trainer(), gan)
    assert ["generator", "Sequential", "2,516", "1,616", "0.01"] in rows(pipe)
    assert ["critic", "Linear", "17", "17", "0.00"] in rows(pipe)
    assert ["total", "GAN", "2,533", "1,633", "0.01"] in rows(pipe)


def test_size_is_in_units_of_two_to_the_twenty_bytes(make_trainer, pipe):
    module = nn.Sequential(
        nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 512, bias=False, dtype=torch.float64)
    )
    ModelSummary(console=pipe).on_fit_start(make_trainer(), module)
    assert [row[-1] for row in rows(pipe) if "Linear" in row] == ["4.00", "4.00"]


def test_a_shared_parameter_counts_once_in_the_total(make_trainer, pipe):
    module = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    module[1].weight = module[0].weight
    ModelSummary(console=pipe).on_fit_start(make_trainer(), module)
    assert [row[2] for row in rows(pipe) if len(row) == 5][1:] == ["100", "100", "100"]


def test_parameters_of_the_module_itself_have_a_row(make_trainer, pipe):
    gan = GAN()
    gan.temperature = nn.Parameter(torch.ones(3))
    ModelSummary(console=pipe).on_fit_start(make_trainer(), gan)
    assert ["(itself)", "GAN", "3", "3", "0.00"] in rows(pipe)


def test_lazy_parameters_do_not_stop_the_summary(make_trainer, pipe):
    module = nn.Sequential(nn.LazyLinear(4))
    ModelSummary(console=pipe).on_fit_start(make_trainer(), module)
    assert ["0", "LazyLinear", "0 + lazy", "0 + lazy", "0.00"] in rows(pipe)


def test_optimizers_are_listed_with_parameters_and_learning_rates(make_trainer, pipe):
    gan = GAN()
    groups = [
        {"params": gan.generator[0].parameters(), "lr": 0.1},
        {"params": [gan.generator[1].weight], "lr": torch.tensor(0.25)},
        {"params": [gan.generator[1].bias], "lr": 0.1},
    ]
    optimizers = {
        "critic": named(torch.optim.Adam(gan.critic.parameters(), lr=2e-4)),
        "generator": named(torch.optim.SGD(groups)),
    }
    ModelSummary(console=pipe).on_fit_start(make_trainer(optimizers=optimizers), gan)
    assert ["critic", "Adam", "17", "0.0002"] in rows(pipe)
    assert ["generator", "SGD", "2,516", "0.1, 0.25"] in rows(pipe)
    assert not [row for row in rows(pipe) if row[0] == "none"]


def test_trainable_parameters_that_no_optimizer_has_are_shown(make_trainer, pipe):
    gan = GAN()
    gan.generator[0].requires_grad_(False)
    optimizers = {"critic": named(torch.optim.SGD(gan.critic.parameters(), lr=0.1))}
    ModelSummary(console=pipe).on_fit_start(make_trainer(optimizers=optimizers), gan)
    assert ["none", "1,616", "-"] in rows(pipe)


def test_without_a_terminal_there_is_neither_colour_nor_a_cut_line(make_trainer, pipe):
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("a_name_" * 20, nn.Linear(1, 1))

    ModelSummary(console=pipe).on_fit_start(make_trainer(), Module())
    assert "\x1b" not in pipe.file.getvalue()
    assert any(row[0] == "a_name_" * 20 for row in rows(pipe))


def test_in_a_terminal_there_is_colour(make_trainer, terminal):
    ModelSummary(console=terminal).on_fit_start(make_trainer(), GAN())
    assert "\x1b[" in terminal.file.getvalue()


def test_all_is_told_once_a_run_however_often_its_loop_trains(make_trainer, pipe):
    trainer = make_trainer(describe_batch=lambda batch: f"{len(batch)} = 2 threads x 16")
    summary = ModelSummary(console=pipe)
    for _ in range(2):
        summary.setup(trainer, GAN(), "fit")
        for _ in range(3):
            summary.on_fit_start(trainer, GAN())
            for batch_idx in range(3):
                summary.on_train_batch_start(trainer, None, [0] * 32, batch_idx)
    assert pipe.file.getvalue().count("one batch  32 = 2 threads x 16\n") == 2
    assert pipe.file.getvalue().count("total") == 2


def test_a_batch_that_did_not_come_is_not_described_in_the_next_run(make_trainer, pipe):
    trainer = make_trainer(describe_batch=str)
    summary = ModelSummary(console=pipe)
    summary.setup(trainer, GAN(), "fit")
    summary.on_fit_start(trainer, GAN())
    summary.setup(trainer, GAN(), "test")
    summary.on_train_batch_start(trainer, None, [0], 0)
    assert "one batch" not in pipe.file.getvalue()


def test_a_batch_of_unknown_size_is_left_out(make_trainer, pipe):
    trainer = make_trainer(describe_batch=lambda batch: None)
    summary = ModelSummary(console=pipe)
    summary.on_fit_start(trainer, GAN())
    summary.on_train_batch_start(trainer, None, [0], 0)
    assert "one batch" not in pipe.file.getvalue()


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_batch_start"])
def test_other_ranks_print_nothing(make_trainer, pipe, hook):
    trainer = make_trainer(is_global_zero=False, describe_batch=str)
    summary = ModelSummary(console=pipe)
    summary.on_fit_start(trainer, GAN())
    if hook == "on_train_batch_start":
        summary.on_train_batch_start(trainer, None, [0], 0)
    assert pipe.file.getvalue() == ""
