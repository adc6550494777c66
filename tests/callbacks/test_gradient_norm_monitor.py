import math
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from composefit.callbacks import GradientNormMonitor
from tests.callbacks.fake import Pair, SteppedTrainer, batches, fit


def optimizer(*gradients: torch.Tensor | None) -> torch.optim.Optimizer:
    parameters = []
    for gradient in gradients:
        parameter = Parameter(torch.zeros(3) if gradient is None else torch.zeros_like(gradient))
        parameter.grad = gradient
        parameters.append(parameter)
    return torch.optim.SGD(parameters, lr=0.1)


def logged(callback: GradientNormMonitor, one: torch.optim.Optimizer) -> float:
    trainer = SteppedTrainer(Path(), callback)
    callback.on_before_optimizer_step(trainer, trainer.module, one, "critic")
    ((name, (value,)),) = trainer.module.logged.items()
    assert name == "grad_norm/critic"
    return float(value)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_it_is_the_norm_of_all_gradients_in_one_vector(norm_type):
    first, second = torch.randn(4, 5), torch.randn(7)
    flat = [abs(x) for x in [*first.flatten().tolist(), *second.tolist()]]
    if norm_type == math.inf:
        expected = max(flat)
    else:
        expected = sum(x**norm_type for x in flat) ** (1 / norm_type)
    found = logged(GradientNormMonitor(norm_type), optimizer(first, None, second))
    assert found == pytest.approx(expected, rel=1e-5)


def test_sparse_gradients_count_with_their_values_summed():
    embedding = torch.nn.Embedding(5, 1, sparse=True)
    # Row 0 comes twice: 1 + 2 = 3, and row 1 is 4.
    (embedding(torch.tensor([0, 0, 1])).flatten() * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    one = torch.optim.SGD(embedding.parameters(), lr=0.1)
    assert logged(GradientNormMonitor(), one) == pytest.approx(5.0)


def test_only_steps_that_loggers_get_are_computed():
    trainer = SteppedTrainer(Path(), GradientNormMonitor(), log_every_n_steps=3)
    steps = []
    for trainer.global_step in range(7):
        before = len(trainer.module.logged.get("grad_norm/net", ()))
        trainer.call("on_before_optimizer_step", optimizer(torch.ones(1)), "net")
        if len(trainer.module.logged.get("grad_norm/net", ())) > before:
            steps.append(trainer.global_step + 1)
    assert steps == [3, 6]


def test_the_value_stays_a_tensor_that_nobody_has_waited_for():
    trainer = SteppedTrainer(Path(), GradientNormMonitor())
    trainer.call("on_before_optimizer_step", optimizer(torch.ones(4, device="meta")), "net")
    # A meta tensor cannot be read: reading it would have raised.
    (value,) = trainer.module.logged["grad_norm/net"]
    assert value.device.type == "meta"


def test_in_a_run_it_is_the_norm_before_clipping(tmp_path):
    module = Pair()
    first = torch.cat(list(batches()))
    fake = module.generator(first)
    loss = (module.critic(fake) - module.critic(first)).mean()
    found = torch.autograd.grad(loss, list(module.critic.parameters()))
    expected = math.sqrt(sum(x * x for one in found for x in one.flatten().tolist()))
    assert expected > 0.1
    trainer = fit(
        tmp_path,
        module,
        GradientNormMonitor(),
        accumulate_grad_batches=6,  # one step of the whole epoch, in whichever order
        gradient_clip_val=1e-3,
        log_every_n_steps=1,
    )
    assert trainer.callback_metrics["grad_norm/critic"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("norm_type", "error"), [(0, ValueError), (-1, ValueError), ("2", TypeError), (True, TypeError)]
)
def test_wrong_arguments_are_refused(norm_type, error):
    with pytest.raises(error, match="norm_type must be"):
        GradientNormMonitor(norm_type)
