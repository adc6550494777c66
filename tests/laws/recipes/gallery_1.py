"""Recipes of `examples/recipes` in reduced size, their own steps: those of part 1 of the gallery.

Smaller networks, GroupNorm where they have BatchNorm, and SGD, which does not divide by gradients
that are nothing but rounding. Each is compared with a loop written by hand, which draws what a
trainer with seed 0 draws.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD

from composefit import LoopModule
from composefit.lockstep.streams import ONCE
from composefit.random import hash_key
from tests.laws.recipe import Draws, Recipe
from tests.laws.recipes.adversarial import draws_of_steps
from tests.laws.recipes.gallery import example


def reduced(
    name: str, make: Callable[[Any], LoopModule], **rates: float
) -> Callable[[], LoopModule]:
    """How to build a module out of a recipe's file, with SGD in place of its own optimizers.

    Args:
        name: of the file.
        make: builds the module, of what stands in the file.
        rates: the learning rate of each optimizer; `rate` for the only one.
    """

    def module() -> LoopModule:
        made = make(example(name))
        originals = made.configure_optimizers

        def configure_optimizers() -> Any:
            own = originals()
            if isinstance(own, dict):
                return {name: SGD(parameters_of(own[name]), lr=lr) for name, lr in rates.items()}
            return SGD((p for p in made.parameters() if p.requires_grad), lr=rates["rate"])

        made.configure_optimizers = configure_optimizers  # type: ignore[method-assign]
        return made

    return module


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer: SGD, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# -- digits ----------------------------------------------------------------------------------------


def images(sizes: list[int]) -> list[Any]:
    draws = Draws(21)
    return [(draws.normal(n, 1, 8, 8).tanh(), draws.integers(10, n)) for n in sizes]


def pairs_of_images(sizes: list[int]) -> list[Any]:
    draws = Draws(22)
    return [tuple(draws.normal(n, 1, 8, 8).tanh() for _ in range(2)) for n in sizes]


# -- DCGAN -----------------------------------------------------------------------------------------


def dcgan(module: Any, batches: Sequence[Any]) -> Iterator[None]:
    critic = SGD(module.critic.parameters(), lr=0.05)
    generator = SGD(module.generator.parameters(), lr=0.05)
    bce = F.binary_cross_entropy_with_logits
    for (real, _), random in zip(batches, draws_of_steps(len(batches)), strict=True):
        fake = module.generator(random.normal(len(real), 64))
        of_real, of_fake = module.critic(real), module.critic(fake.detach())
        step(
            critic, bce(of_real, torch.ones_like(of_real)) + bce(of_fake, torch.zeros_like(of_fake))
        )
        of_fake = module.critic(fake)
        step(generator, bce(of_fake, torch.ones_like(of_fake)))
        yield


# -- WGAN-GP ---------------------------------------------------------------------------------------


def wgan_gp(module: Any, batches: Sequence[Any]) -> Iterator[None]:
    critic = SGD(module.critic.parameters(), lr=0.02)
    generator = SGD(module.generator.parameters(), lr=0.02)
    draws = draws_of_steps(len(batches))
    for i, ((real, _), random) in enumerate(zip(batches, draws, strict=True)):
        n = len(real)
        for _ in range(1 if module.fresh else 5):
            fake = module.generator(random.normal(n, 64)).detach()
            mix = random.uniform(n, 1, 1, 1)
            between = (real + mix * (fake - real)).requires_grad_()
            scores = module.critic(between).sum()
            (slope,) = torch.autograd.grad(scores, between, create_graph=True)
            penalty = 10 * (slope.square().sum((1, 2, 3)).sqrt() - 1).square().mean()
            step(critic, module.critic(fake).mean() - module.critic(real).mean() + penalty)
        if not module.fresh or i % 5 == 4:
            step(generator, -module.critic(module.generator(random.normal(n, 64))).mean())
        yield


# -- StyleGAN2 -------------------------------------------------------------------------------------


def stylegan2(module: Any, batches: Sequence[Any]) -> Iterator[None]:
    critic = SGD(module.critic.parameters(), lr=0.02)
    drawing = chain(module.mapping.parameters(), module.synthesis.parameters())
    generator = SGD(drawing, lr=0.02)
    path_mean = torch.zeros((), dtype=torch.float64)

    def draw(random: Any, n: int) -> tuple[Tensor, Tensor]:
        first, second = (module.mapping(random.normal(n, 1, 32)) for _ in range(2))
        mixed = random.shared.uniform() < 0.9
        at = random.shared.integers(low=1, high=3).item() if mixed else 3
        styles = torch.cat([first] * at + [second] * (3 - at), 1)
        noise = [random.normal(n, 1, s, s) for s in (4, 8, 8)]
        return module.synthesis(styles, noise), styles

    draws = draws_of_steps(len(batches))
    for i, ((real, _), random) in enumerate(zip(batches, draws, strict=True)):
        n = len(real)
        step(generator, F.softplus(-module.critic(draw(random, n)[0])).mean())
        if i % 4 == 0:
            fake, styles = draw(random, n)
            direction = random.normal(n, 1, 8, 8) / 8
            (slope,) = torch.autograd.grad((fake * direction).sum(), styles, create_graph=True)
            lengths = slope.square().sum(2).mean(1).sqrt()
            path_mean = path_mean + 0.1 * (lengths.detach().mean() - path_mean)
            step(generator, 0.4 * (lengths - path_mean).square().mean())
        fake = draw(random, n)[0].detach()
        of_real, of_fake = module.critic(real), module.critic(fake)
        step(critic, F.softplus(of_fake).mean() + F.softplus(-of_real).mean())
        if i % 16 == 0:
            real = real.clone().requires_grad_()
            (slope,) = torch.autograd.grad(module.critic(real).sum(), real, create_graph=True)
            step(critic, 8 * slope.square().sum((1, 2, 3)).mean())
        yield


# -- CycleGAN --------------------------------------------------------------------------------------


def draws_of_once(count: int) -> Iterator[torch.Generator]:
    """What draws within `Once`, in each step of a trainer with seed 0."""
    for i in range(count):
        yield torch.Generator().manual_seed(hash_key(0, ONCE, i))


def cyclegan(module: Any, batches: Sequence[Any]) -> Iterator[None]:
    translators = chain(module.a_to_b.parameters(), module.b_to_a.parameters())
    judges = chain(module.critic_a.parameters(), module.critic_b.parameters())
    generators, critics = SGD(translators, lr=0.02), SGD(judges, lr=0.02)
    pools: tuple[list[Tensor], ...] = ([], [])

    def exchanged(images: Tensor, pool: list[Tensor], draws: torch.Generator) -> Tensor:
        out = []
        for image in images.detach():
            if len(pool) < 8:
                pool.append(image)
            elif torch.rand((), generator=draws) < 0.5:
                j = int(torch.randint(8, (), generator=draws))
                image, pool[j] = pool[j], image
            out.append(image)
        return torch.stack(out)

    def squares(scores: Tensor, wanted: float) -> Tensor:
        return F.mse_loss(scores, torch.full_like(scores, wanted))

    for (a, b), draws in zip(batches, draws_of_once(len(batches)), strict=True):
        of_a, of_b = module.critic_a, module.critic_b
        fake_a, fake_b = module.b_to_a(b), module.a_to_b(a)
        cycle = F.l1_loss(module.b_to_a(fake_b), a) + F.l1_loss(module.a_to_b(fake_a), b)
        step(generators, squares(of_a(fake_a), 1) + squares(of_b(fake_b), 1) + 10 * cycle)
        old_a, old_b = (
            exchanged(*pair, draws) for pair in zip((fake_a, fake_b), pools, strict=True)
        )
        loss = squares(of_a(a), 1) + squares(of_a(old_a), 0)
        step(critics, 0.5 * (loss + squares(of_b(b), 1) + squares(of_b(old_b), 0)))
        yield


# -- VQ-GAN ----------------------------------------------------------------------------------------


def vqgan(module: Any, batches: Sequence[Any]) -> Iterator[None]:
    coder = SGD(chain(module.encoder.parameters(), module.decoder.parameters()), lr=0.05)
    critic = SGD(module.critic.parameters(), lr=0.05)
    codes, counts = module.book.codes.clone(), module.book.counts.clone()
    last = module.decoder[-1].weight
    for i, ((x, _), draws) in enumerate(zip(batches, draws_of_once(len(batches)), strict=True)):
        z = module.encoder(x)
        rows = z.permute(0, 2, 3, 1).reshape(-1, len(codes[0]))
        chosen = (rows[:, None] - codes).square().sum(2).argmin(1)
        code = codes[chosen].view(len(x), *z.shape[2:], -1).permute(0, 3, 1, 2)
        copies = module.decoder(code.detach() + z - z.detach())
        loss = F.l1_loss(copies, x)
        if i >= 2:
            fooled = -module.critic(copies).mean()
            ours, theirs = (
                torch.autograd.grad(one, last, retain_graph=True)[0].norm()
                for one in (loss, fooled)
            )
            loss = loss + 0.8 * (ours / (theirs + 1e-4)).clamp(0, 1e4) * fooled
        step(coder, loss + 0.25 * F.mse_loss(z, code))
        if i >= 2:
            hinges = F.relu(1 - module.critic(x)), F.relu(1 + module.critic(copies.detach()))
            step(critic, 0.5 * (hinges[0].mean() + hinges[1].mean()))
        rows = rows.detach()
        fresh = rows[torch.randint(len(rows), (len(codes),), generator=draws)]
        fresh += 0.01 * torch.randn(codes.shape, generator=draws, dtype=codes.dtype)
        for j in range(len(codes)):
            own = rows[chosen == j]
            total = 0.95 * counts[j] * codes[j] + 0.05 * own.sum(0)
            counts[j] = 0.95 * counts[j] + 0.05 * len(own)
            codes[j] = total / counts[j] if counts[j] > 0.01 else fresh[j]
        yield


# -- diffusion -------------------------------------------------------------------------------------


def diffusion(module: Any, batches: Sequence[Any]) -> Iterator[None]:
    optimizer = SGD(module.parameters(), lr=0.1)
    kept = module.kept
    for (x, _), random in zip(batches, draws_of_steps(len(batches)), strict=True):
        time = random.integers(len(x), high=len(kept))
        noise = random.normal(len(x), 1, 8, 8)
        left = kept[time].view(-1, 1, 1, 1)
        found = module.network(left.sqrt() * x + (1 - left).sqrt() * noise, time)
        step(optimizer, (found - noise).square().mean())
        yield


# -- language models -------------------------------------------------------------------------------


def lines(length: int) -> Callable[[list[int]], list[Any]]:
    """Lines that end early: how many characters they hold is no multiple of how many they are."""

    def batches(sizes: list[int]) -> list[Any]:
        found, draws = [], Draws(23)
        for n in sizes:
            ids = 1 + draws.integers(20, n, length)
            ends = 2 + draws.integers(length - 1, n)
            found.append([ids * (torch.arange(length) < ends[:, None])])
        return found

    return batches


def language_model(module: Any, batches: Sequence[Any]) -> Iterator[None]:
    optimizer = SGD(module.parameters(), lr=0.1)
    for (ids,) in batches:
        chances = module(ids[:, :-1]).log_softmax(2)
        nll = -chances.gather(2, ids[:, 1:, None]).squeeze(2)
        counts = ids[:, :-1] != 0
        step(optimizer, (nll * counts).sum() / counts.sum())
        yield


def mixture_of_experts(module: Any, batches: Sequence[Any]) -> Iterator[None]:
    optimizer = SGD(module.parameters(), lr=0.1)
    hidden_id = len(example("_common").CHARACTERS)
    for (ids,), random in zip(batches, draws_of_steps(len(batches)), strict=True):
        hidden = (random.bernoulli(*ids.shape, p=0.15) == 1) & (ids != 0)
        scores, chances = module(torch.where(hidden, hidden_id, ids))
        guessed = F.cross_entropy(scores[hidden], ids[hidden])
        chances = chances[ids != 0]
        experts = chances.shape[2]
        busy = torch.zeros(())
        for layer in range(chances.shape[1]):
            sent = torch.bincount(chances[:, layer].argmax(1), minlength=experts) / len(chances)
            busy = busy + experts * (sent * chances[:, layer].mean(0)).sum()
        step(optimizer, guessed + 0.01 * busy)
        yield


def labelled_lines(sizes: list[int]) -> list[Any]:
    """What a collator of Transformers makes of lines."""
    found = []
    for (ids,) in lines(8)(sizes):
        real = ids != 0
        labels = ids.masked_fill(~real, -100)
        found.append({"input_ids": ids, "attention_mask": real.long(), "labels": labels})
    return found


def in_float64(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    """The loss of Transformers' language models, which itself rounds the scores to float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def make_lora(file: Any) -> LoopModule:
    module = file.Causal(file.model(width=16, layers=1))
    module.model.loss_function = in_float64
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if name.endswith("norm"):  # theirs rounds to float32 as well
                setattr(parent, name, nn.RMSNorm(16, child.variance_epsilon))
    file.add_lora(module.model)
    for layer in module.modules():
        if isinstance(layer, file.LoRA):  # at zero, the other matrix would not move at first
            nn.init.normal_(layer.up.weight, std=0.3)
    return module


def lora(module: Any, batches: Sequence[Any]) -> Iterator[None]:
    thin = [p for name, p in module.named_parameters() if ".up." in name or ".down." in name]
    optimizer = SGD(thin, lr=0.5)
    for batch in batches:
        scores = module.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
        wanted = batch["labels"][:, 1:]
        step(optimizer, F.cross_entropy(scores[wanted != -100], wanted[wanted != -100]))
        yield


# -- distillation ----------------------------------------------------------------------------------


def make_student(file: Any) -> LoopModule:
    return file.Student(file.Classifier(16).network, width=8)


def distillation(module: Any, batches: Sequence[Any]) -> Iterator[None]:
    optimizer = SGD(module.network.parameters(), lr=0.05)
    for x, y in batches:
        told, scores = module.teacher(x).detach(), module.network(x)
        away = (told / 4).softmax(1) * ((told / 4).log_softmax(1) - (scores / 4).log_softmax(1))
        step(optimizer, 0.9 * 16 * away.sum(1).mean() + 0.1 * F.cross_entropy(scores, y))
        yield


# -- PCGrad ----------------------------------------------------------------------------------------


def overlaid(sizes: list[int]) -> list[Any]:
    draws = Draws(24)
    return [
        [draws.normal(n, 1, 12, 12).tanh(), draws.integers(10, n), draws.integers(10, n)]
        for n in sizes
    ]


def multitask_pcgrad(module: Any, batches: Sequence[Any]) -> Iterator[None]:
    trunk = list(module.trunk.parameters())
    heads = SGD(module.heads.parameters(), lr=0.1)
    against = 0
    for x, *wanted in batches:
        features = module.trunk(x)
        pairs = zip(module.heads, wanted, strict=True)
        losses = [F.cross_entropy(head(features), y) for head, y in pairs]
        a, b = (
            parameters_to_vector(torch.autograd.grad(loss, trunk, retain_graph=True))
            for loss in losses
        )
        dot = a @ b
        against += bool(dot < 0)
        if dot < 0:
            a, b = a - dot / (b @ b) * b, b - dot / (a @ a) * a
        step(heads, sum(losses, torch.zeros(())))
        with torch.no_grad():
            change = (a + b).split([p.numel() for p in trunk])
            for p, g in zip(trunk, change, strict=True):
                p -= 0.1 * g.view_as(p)
        yield
    assert 0 < against < len(batches)  # both kinds have occurred


def make_two_digits(file: Any) -> LoopModule:
    module = file.TwoDigits(width=8)
    # Heads that want opposite things of the trunk, so that some gradients go against each other.
    module.heads[1] = copy.deepcopy(module.heads[0])
    with torch.no_grad():
        module.heads[1].weight.neg_()
    return module


def groups_of_images(sizes: list[int]) -> list[Any]:
    """Several groups of four, and a rest."""
    return images([4 * n + 3 for n in sizes])


RECIPES = {
    "DCGAN": Recipe(
        reduced("dcgan", lambda f: f.DCGAN(4, norm="group"), critic=0.05, generator=0.05),
        images,
        dcgan,
    ),
    "WGAN-GP, fresh batches": Recipe(
        reduced("wgan_gp", lambda f: f.WGANGP(4), critic=0.02, generator=0.02), images, wgan_gp
    ),
    "WGAN-GP, one batch": Recipe(
        reduced("wgan_gp", lambda f: f.WGANGP(4, fresh=False), critic=0.02, generator=0.02),
        images,
        wgan_gp,
    ),
    "StyleGAN2": Recipe(
        reduced("stylegan2", lambda f: f.StyleGAN2(4), critic=0.02, generator=0.02),
        groups_of_images,
        stylegan2,
    ),
    "CycleGAN": Recipe(
        reduced("cyclegan", lambda f: f.CycleGAN(4, pool=8), generators=0.02, critics=0.02),
        pairs_of_images,
        cyclegan,
    ),
    "VQ-GAN": Recipe(
        reduced("vqgan", lambda f: f.VQGAN(8, "group", critic_from=2), coder=0.05, critic=0.05),
        images,
        vqgan,
    ),
    "diffusion": Recipe(
        reduced("diffusion", lambda f: f.Diffusion(16), rate=0.1), images, diffusion
    ),
    "language model": Recipe(
        reduced("language_model", lambda f: f.LanguageModel(16, 1), rate=0.1),
        lines(9),
        language_model,
    ),
    "mixture of experts": Recipe(
        reduced("mixture_of_experts", lambda f: f.MixtureOfExperts(16, 3, 2), rate=0.1),
        lines(12),
        mixture_of_experts,
    ),
    "LoRA": Recipe(reduced("lora", make_lora, rate=0.5), labelled_lines, lora),
    "distillation": Recipe(reduced("distillation", make_student, rate=0.05), images, distillation),
    "PCGrad": Recipe(
        reduced("multitask_pcgrad", make_two_digits, trunk=0.1, heads=0.1),
        overlaid,
        multitask_pcgrad,
    ),
}
