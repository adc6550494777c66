"""What is seen of single operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from composefit.check import Trace, telling_size
from composefit.random import SampleRandom

N = 7
LAYER = nn.Linear(5, 3)


def kinds(function: Callable[..., Tensor], *batch: Any, module: nn.Module = LAYER) -> set[str]:
    with Trace(N, batch, module) as trace:
        loss = function(*batch)
    return {event.kind for event in trace.of(loss)}


def x() -> Tensor:
    return torch.randn(N, 5)


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: LAYER(x).square().mean(),
    "weight decay": lambda x: LAYER(x).mean() + LAYER.weight.square().sum().sqrt(),
    "norm of each sample": lambda x: F.normalize(LAYER(x), dim=1).square().mean(),
    "statistics of each sample": lambda x: F.layer_norm(LAYER(x), (3,)).mean(),
    "softmax of each sample": lambda x: LAYER(x).softmax(1).max(1).values.mean(),
    "sum of two means": lambda x: 2 * LAYER(x).mean() - x.mean() / 3,
    "one sample after another": lambda x: torch.stack([LAYER(one).exp().sum() for one in x]).mean(),
    "binary cross entropy": lambda x: F.binary_cross_entropy_with_logits(LAYER(x), x[:, :3] * 0),
    "a statistic that is dropped": lambda x: (x.std(), LAYER(x).mean())[1],
}

COUPLING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "variance": (lambda x: LAYER(x).var(0).sum(), "minibatch statistics"),
    "centred": (lambda x: (LAYER(x) - LAYER(x).mean(0)).square().mean(), "minibatch statistics"),
    "detached": (lambda x: (LAYER(x) / x.detach().abs().max()).mean(), "minibatch statistics"),
    "whitened": (lambda x: (LAYER(x) @ (LAYER(x).T @ LAYER(x))).mean(), "minibatch statistics"),
    "clamped mean": (lambda x: LAYER(x).mean().clamp(min=0.5), "minibatch statistics"),
    "quotient": (lambda x: LAYER(x).sum() / (x > 0).sum(), "token mean by hand"),
    "root": (lambda x: LAYER(x).square().mean() ** 0.5, "RMSE"),
    "norm": (lambda x: torch.linalg.vector_norm(LAYER(x)), "norm per shard"),
    "distances": (
        lambda x: torch.cdist(LAYER(x), LAYER(x)).mean(),
        "contrastive loss without Gather",
    ),
    "pairs": (
        lambda x: (LAYER(x)[:, None] - LAYER(x)[None]).square().mean(),
        "contrastive loss without Gather",
    ),
    "softmax over samples": (
        lambda x: (LAYER(x).softmax(0) * x[:, :3]).sum(),
        "contrastive loss without Gather",
    ),
    "noise": (lambda x: LAYER(x + torch.rand(N, 5)).mean(), "draw that depends on the strategy"),
    "own generator": (
        lambda x: LAYER(x + torch.rand(N, 5, generator=torch.Generator())).mean(),
        "draw that depends on the strategy",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_samples_that_keep_to_themselves_are_no_event(name: str) -> None:
    assert kinds(RIGHT[name], x()) == set()


@pytest.mark.parametrize("name", COUPLING)
def test_samples_that_meet_are_an_event(name: str) -> None:
    function, kind = COUPLING[name]
    assert kind in kinds(function, x())


def test_draws_of_self_random_are_no_event() -> None:
    random = SampleRandom(0)

    def step(x: Tensor) -> Tensor:
        mask = random.shared.bernoulli(1, 5, p=0.5)
        return (LAYER(x + random.normal(N, 5)) * mask[:, :3]).mean()

    batch = x()
    with Trace(N, batch, LAYER) as trace:
        trace.trust(random.shared)
        loss = step(batch)
    assert trace.of(loss) == []


@pytest.mark.parametrize(
    "layer", [nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4).eval()]
)
def test_normalisation_of_each_sample_is_no_event(layer: nn.Module) -> None:
    images = torch.randn(N, 4, 3, 3)
    assert kinds(lambda x: layer(x).square().mean(), images, module=layer) == set()


def test_event_says_which_layer_and_line() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.BatchNorm2d(4)))
    images = torch.randn(N, 1, 5, 5)
    with Trace(N, images, net) as trace:
        net(images)
    (event,) = trace.events
    assert event.operation == "aten.native_batch_norm"
    assert event.module == "1.0 (BatchNorm2d)"
    assert event.where is not None
    assert "test_trace.py" in event.where


def test_what_comes_from_all_shards_meets_with_nobodys_harm() -> None:
    batch = x()
    everything = torch.randn(2 * N + 3, 3)
    with Trace(N, batch, LAYER) as trace:
        trace.receive(everything, [], rows=False)
        loss = F.cross_entropy(LAYER(batch) @ everything.T, torch.arange(N))
        statistic = (LAYER(batch) - everything.mean(0)).square().mean()
    assert trace.of(loss, statistic) == []


def test_nothing_is_seen_while_it_rests() -> None:
    batch = x()
    with Trace(N, batch, LAYER) as trace, trace.resting():
        batch.std()
    assert trace.events == []


@pytest.mark.parametrize(("samples", "group"), [(64, 1), (7, 1), (2, 1), (12, 4), (33, 2)])
def test_a_telling_size_leaves_two_parts_of_whole_groups(samples: int, group: int) -> None:
    first = telling_size(samples, group, nn.Linear(43, 21))
    assert 0 < first < samples
    assert first % group == 0
    assert first != samples - first or samples == 2 * group


def test_a_telling_size_is_no_size_of_a_weight() -> None:
    assert telling_size(64, 1, nn.Linear(43, 86)) not in (43, 86)
    assert 86 % telling_size(64, 1, nn.Linear(43, 86))
