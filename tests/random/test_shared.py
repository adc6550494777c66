import torch

from composefit.random.samples import SampleRandom
from composefit.random.shared import SharedRandom

CPU = torch.device("cpu")


def shard(start: int, stop: int, *, step: int = 0, seed: int = 0) -> SampleRandom:
    random = SampleRandom(seed)
    random.begin(step, start, stop, 8, torch.float64, CPU)
    return random


def test_it_is_a_generator_that_torch_takes() -> None:
    shared = shard(0, 4).shared
    assert isinstance(shared, torch.Generator)
    as_plain = torch.Generator().manual_seed(shared.initial_seed())
    for draw in (
        lambda g: torch.rand(5, generator=g),
        lambda g: torch.randperm(5, generator=g),
        lambda g: torch.bernoulli(torch.full((9,), 0.5), generator=g),
        lambda g: torch.empty(5).exponential_(generator=g),
    ):
        assert torch.equal(draw(shared), draw(as_plain))


def test_every_shard_draws_the_same_whatever_else_it_drew() -> None:
    first, second = shard(0, 4), shard(4, 8)
    first.normal(4, 3)
    for _ in range(3):
        assert torch.equal(first.shared.permutation(50), second.shared.permutation(50))
        assert torch.equal(first.shared.normal(9), second.shared.normal(9))


def test_it_goes_on_within_a_step_and_starts_anew_with_the_next() -> None:
    random = shard(0, 4)
    first, second = random.shared.normal(9), random.shared.normal(9)
    assert not torch.equal(first, second)
    random.begin(1, 0, 4, 8, torch.float64, CPU)
    third = random.shared.normal(9)
    assert not torch.equal(third, first)
    random.begin(0, 0, 4, 8, torch.float64, CPU)  # the step again, as a closure does
    assert torch.equal(random.shared.normal(9), first)
    assert torch.equal(shard(0, 4, step=1).shared.normal(9), third)
    assert not torch.equal(shard(0, 4, seed=1).shared.normal(9), first)


def test_its_methods_draw_from_it_as_torch_does() -> None:
    shared, plain = SharedRandom(), torch.Generator()
    shared.manual_seed(1)
    plain.manual_seed(1)
    f32 = torch.float32
    assert torch.equal(
        shared.normal(2, 3, mean=1, std=2), torch.empty(2, 3).normal_(1, 2, generator=plain)
    )
    assert torch.equal(
        shared.uniform(5, low=-1, high=3), torch.empty(5).uniform_(-1, 3, generator=plain)
    )
    assert torch.equal(
        shared.integers(5, low=-2, high=9), torch.randint(-2, 9, (5,), generator=plain)
    )
    assert torch.equal(shared.bernoulli(9, p=0.2), torch.empty(9).bernoulli_(0.2, generator=plain))
    assert torch.equal(shared.permutation(9), torch.randperm(9, generator=plain))
    assert shared.normal().shape == ()
    assert shared.normal(2).dtype == f32


def test_its_draws_have_the_dtype_of_the_step() -> None:
    assert shard(0, 4).shared.normal(3).dtype == torch.float64
    assert shard(0, 4).shared.permutation(3).dtype == torch.int64
