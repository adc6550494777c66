"""Two networks against each other: GANs in every order, WGAN-GP, noise and coins of the step."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from composefit import LoopModule, Step, Update
from composefit.random import SampleRandom
from tests.laws.recipe import Draws, Recipe

CPU = torch.device("cpu")


def reals(sizes: list[int]) -> list[Any]:
    """Real samples, noise, and a number between 0 and 1, for each sample."""
    draws = Draws(3)
    return [(draws.normal(n, 2) + 1, draws.normal(n, 3), draws.uniform(n, 1)) for n in sizes]


def real_loss(scores: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, torch.ones_like(scores))


def fake_loss(scores: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, torch.zeros_like(scores))


class GAN(LoopModule):
    """The critic first; `fake` is used by both, without a detach."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
        self.critic = nn.Sequential(nn.Linear(2, 6), nn.Softplus(), nn.Linear(6, 1))

    def training_step(self, batch: Any) -> Step:
        real, noise, _ = batch
        fake = self.generator(noise)
        yield {"critic": real_loss(self.critic(real)) + fake_loss(self.critic(fake))}
        yield {"generator": real_loss(self.critic(fake))}

    def configure_optimizers(self) -> dict[str, SGD]:
        return {
            "critic": SGD(self.critic.parameters(), lr=0.2),
            "generator": SGD(self.generator.parameters(), lr=0.1),
        }


def optimizers(module: GAN) -> tuple[SGD, SGD]:
    return SGD(module.critic.parameters(), lr=0.2), SGD(module.generator.parameters(), lr=0.1)


def critic_step(module: GAN, critic: SGD, real: Tensor, fake: Tensor) -> None:
    critic.zero_grad()
    (real_loss(module.critic(real)) + fake_loss(module.critic(fake.detach()))).backward()
    critic.step()


def generator_step(module: GAN, generator: SGD, fake: Tensor) -> None:
    generator.zero_grad()
    real_loss(module.critic(fake)).backward()
    generator.step()


def gan(module: GAN, batches: list[Any]) -> Iterator[None]:
    critic, generator = optimizers(module)
    for real, noise, _ in batches:
        fake = module.generator(noise)
        critic_step(module, critic, real, fake)
        generator_step(module, generator, fake)
        yield


class GeneratorFirst(GAN):
    def training_step(self, batch: Any) -> Step:
        real, noise, _ = batch
        fake = self.generator(noise)
        yield {"generator": real_loss(self.critic(fake))}
        yield {"critic": real_loss(self.critic(real)) + fake_loss(self.critic(fake))}


def generator_first(module: GAN, batches: list[Any]) -> Iterator[None]:
    critic, generator = optimizers(module)
    for real, noise, _ in batches:
        fake = module.generator(noise)
        generator_step(module, generator, fake)
        critic_step(module, critic, real, fake)
        yield


class Simultaneous(GAN):
    def training_step(self, batch: Any) -> Step:
        real, noise, _ = batch
        scores = self.critic(self.generator(noise))
        yield {
            "critic": real_loss(self.critic(real)) + fake_loss(scores),
            "generator": real_loss(scores),
        }


def simultaneous(module: GAN, batches: list[Any]) -> Iterator[None]:
    critic, generator = optimizers(module)
    for real, noise, _ in batches:
        fake = module.generator(noise)
        critic.zero_grad()
        (real_loss(module.critic(real)) + fake_loss(module.critic(fake.detach()))).backward()
        taken = [p.grad.clone() for p in module.critic.parameters()]
        generator.zero_grad()
        real_loss(module.critic(fake)).backward()  # adds to the critic's gradients as well
        for p, gradient in zip(module.critic.parameters(), taken, strict=True):
            p.grad = gradient
        critic.step()
        generator.step()
        yield


class OneGraph(GAN):
    """The generator first, and the same scores for both: their graph is kept for the critic."""

    def training_step(self, batch: Any) -> Step:
        real, noise, _ = batch
        scores = self.critic(self.generator(noise))
        yield Update({"generator": real_loss(scores)}, retain_graph=True)
        yield {"critic": real_loss(self.critic(real)) + fake_loss(scores)}


def one_graph(module: GAN, batches: list[Any]) -> Iterator[None]:
    critic, generator = optimizers(module)
    for real, noise, _ in batches:
        fake = module.generator(noise)
        before = fake.detach()
        generator_step(module, generator, fake)
        critic_step(module, critic, real, before)
        yield


# -- WGAN-GP ---------------------------------------------------------------------------------------


class WassersteinGAN(GAN):
    """Five critic steps on one `fake`, with the gradient penalty of Gulrajani et al., 2017."""

    def training_step(self, batch: Any) -> Step:
        real, noise, mix = batch
        fake = self.generator(noise)
        for _ in range(5):
            between = mix * real + (1 - mix) * fake
            (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
            penalty = (slope.norm(dim=1) - 1).square().mean()
            yield {"critic": self.critic(fake).mean() - self.critic(real).mean() + 10 * penalty}
        yield {"generator": -self.critic(fake).mean()}

    def configure_optimizers(self) -> dict[str, SGD]:
        return {
            "critic": SGD(self.critic.parameters(), lr=0.02),
            "generator": SGD(self.generator.parameters(), lr=0.1),
        }


def wasserstein_gan(module: GAN, batches: list[Any]) -> Iterator[None]:
    critic = SGD(module.critic.parameters(), lr=0.02)
    generator = SGD(module.generator.parameters(), lr=0.1)
    for real, noise, mix in batches:
        fake = module.generator(noise)
        for _ in range(5):
            critic.zero_grad()
            between = (mix * real + (1 - mix) * fake.detach()).requires_grad_()
            (slope,) = torch.autograd.grad(module.critic(between).sum(), between, create_graph=True)
            penalty = (slope.norm(dim=1) - 1).square().mean()
            distance = module.critic(real).mean() - module.critic(fake.detach()).mean()
            (10 * penalty - distance).backward()
            critic.step()
        generator.zero_grad()
        (-module.critic(fake).mean()).backward()
        generator.step()
        yield


# -- noise and coins of the step -------------------------------------------------------------------


class OwnNoise(GAN):
    """Noise from `self.random`: the same for a sample, whichever shard it is in."""

    def training_step(self, batch: Any) -> Step:
        real, _, _ = batch
        fake = self.generator(self.random.normal(len(real), 3))
        yield {"critic": real_loss(self.critic(real)) + fake_loss(self.critic(fake))}
        other = self.generator(self.random.normal(len(real), 3))
        yield {"generator": real_loss(self.critic(other))}


def draws_of_steps(count: int) -> Iterator[SampleRandom]:
    """The draws of a trainer with seed 0, for the full batch of each step."""
    random = SampleRandom(0)
    for step in range(count):
        random.begin(step, 0, None, None, torch.float64, CPU)
        yield random


def own_noise(module: GAN, batches: list[Any]) -> Iterator[None]:
    critic, generator = optimizers(module)
    for (real, _, _), random in zip(batches, draws_of_steps(len(batches)), strict=True):
        critic_step(module, critic, real, module.generator(random.normal(len(real), 3)))
        generator_step(module, generator, module.generator(random.normal(len(real), 3)))
        yield


class Coin(GAN):
    """A coin decides whose turn it is: the same on every shard."""

    def training_step(self, batch: Any) -> Step:
        real, noise, _ = batch
        fake = self.generator(noise)
        if self.random.shared.uniform() < 0.5:
            yield {"critic": real_loss(self.critic(real)) + fake_loss(self.critic(fake))}
        else:
            yield {"generator": real_loss(self.critic(fake))}


def coin(module: GAN, batches: list[Any]) -> Iterator[None]:
    critic, generator = optimizers(module)
    turns = []
    for (real, noise, _), random in zip(batches, draws_of_steps(len(batches)), strict=True):
        fake = module.generator(noise)
        turns.append(bool(random.shared.uniform() < 0.5))
        if turns[-1]:
            critic_step(module, critic, real, fake)
        else:
            generator_step(module, generator, fake)
        yield
    assert set(turns) == {True, False}


RECIPES = {
    "GAN, critic first": Recipe(GAN, reals, gan),
    "GAN, generator first": Recipe(GeneratorFirst, reals, generator_first),
    "GAN, simultaneous": Recipe(Simultaneous, reals, simultaneous),
    "GAN, one graph for both": Recipe(OneGraph, reals, one_graph),
    "WGAN-GP": Recipe(WassersteinGAN, reals, wasserstein_gan),
    "GAN with noise of self.random": Recipe(OwnNoise, reals, own_noise),
    "GAN with a coin of self.random.shared": Recipe(Coin, reals, coin),
}
