"""The demo's modules: what the step does, and that it is the same under every strategy."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from composefit import SingleDevice, Strategy, ThreadDataParallel, Trainer
from composefit.demo.models import GAN, NOISE, Classifier, gradient_penalty


class SGDGAN(GAN):
    """Adam would turn rounding into steps of its full length where a gradient is almost zero."""

    def configure_optimizers(self) -> dict[str, Optimizer]:
        return {
            "critic": SGD(self.critic.parameters(), lr=0.05),
            "generator": SGD(self.generator.parameters(), lr=0.05),
        }


def train(strategy: Strategy, gan: GAN, **options: int) -> GAN:
    images = torch.rand(22, 1, 8, 8, dtype=torch.float64) * 2 - 1
    Trainer(
        strategy=strategy,
        precision="64",
        max_epochs=4,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        seed=0,
        **options,
    ).fit(gan, DataLoader(TensorDataset(images, torch.zeros(22)), batch_size=8))
    return gan


def new(kind: type[GAN] = SGDGAN) -> GAN:
    torch.manual_seed(0)
    return kind(width=4).double()


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(lambda: SingleDevice(shards=3), id="3 shards"),
        pytest.param(lambda: ThreadDataParallel(2), id="2 threads"),
        pytest.param(lambda: ThreadDataParallel(3), id="3 threads"),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gan_ends_at_the_same_weights_under_every_strategy(
    strategy: Callable[[], Strategy], accumulate: int
) -> None:
    start = new()
    torch.manual_seed(1)
    one = train(SingleDevice(), new(), accumulate_grad_batches=accumulate)
    torch.manual_seed(1)
    many = train(strategy(), new(), accumulate_grad_batches=accumulate)
    for (name, a), b, before in zip(
        one.named_parameters(), many.parameters(), start.parameters(), strict=True
    ):
        assert (a - b).abs().max() <= 1e-10 * a.abs().max(), name
        assert (a - before).abs().max() > 1e-6, name


def test_a_step_is_what_one_would_write_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.rand(6, 1, 8, 8, dtype=torch.float64) * 2 - 1
    noises: list[Tensor] = []
    gan, expected = new(), new()
    draw = gan.generator.forward
    monkeypatch.setattr(gan.generator, "forward", lambda z: noises.append(z) or draw(z))
    trainer = Trainer(
        strategy=SingleDevice(),
        precision="64",
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(gan, [(real.clone(), torch.zeros(6))])

    (noise,) = noises
    assert noise.shape == (6, NOISE)
    optimizers = expected.configure_optimizers()
    fake = expected.generator(noise)
    real.requires_grad_()
    scores = expected.critic(real)
    (slope,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
    loss = softplus(-scores).mean() + softplus(expected.critic(fake.detach())).mean()
    (loss + 0.5 * slope.square().sum() / 6).backward()
    optimizers["critic"].step()
    optimizers["generator"].zero_grad()
    softplus(-expected.critic(fake)).mean().backward()
    optimizers["generator"].step()
    for name in ("critic", "generator"):
        for a, b in zip(
            getattr(gan, name).parameters(), getattr(expected, name).parameters(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_averaged_generator_follows_and_is_what_the_module_calls() -> None:
    start = new()
    gan = train(SingleDevice(), new())
    assert all(not p.requires_grad for p in gan.average.parameters())
    for before, mean, now in zip(
        start.generator.parameters(),
        gan.average.parameters(),
        gan.generator.parameters(),
        strict=True,
    ):
        assert (mean - now).norm() < (before - now).norm()
        assert not torch.equal(mean, now)
    noise = torch.randn(3, NOISE, dtype=torch.float64)
    assert torch.equal(gan(noise), gan.average(noise))
    assert gan(noise).shape == (3, 1, 8, 8)


def test_the_gradient_penalty_of_a_linear_critic_is_half_its_squared_weights() -> None:
    critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    images = torch.randn(5, 1, 8, 8, requires_grad=True)
    penalty = gradient_penalty(critic(images), images, weight=3.0)
    torch.testing.assert_close(penalty, 1.5 * critic[1].weight.square().sum())


def test_samples_do_not_see_each_other() -> None:
    images, noise = torch.rand(6, 1, 8, 8), torch.randn(6, NOISE)
    gan, classifier = GAN().train(), Classifier().train()
    for network, x in ((gan.generator, noise), (gan.critic, images), (classifier, images)):
        torch.testing.assert_close(network(x)[:2], network(x[:2]))
