import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from composefit.random.samples import SampleRandom, _normal

CPU = torch.device("cpu")
Draw = Callable[[SampleRandom, int], Tensor]

KINDS: dict[str, Draw] = {
    "normal": lambda random, n: random.normal(n, 3),
    "normal, float64": lambda random, n: random.normal(n, 3, dtype=torch.float64),
    "normal, bfloat16": lambda random, n: random.normal(n, 3, dtype=torch.bfloat16),
    "normal, moved": lambda random, n: random.normal(n, 3, mean=2.0, std=3.0),
    "normal, long rows": lambda random, n: random.normal(n, 17, 5),
    "normal, one each": lambda random, n: random.normal(n),
    "uniform": lambda random, n: random.uniform(n, 5),
    "uniform, float64": lambda random, n: random.uniform(n, 5, low=-1, high=3, dtype=torch.float64),
    "integers": lambda random, n: random.integers(n, 3, high=1000),
    "bernoulli": lambda random, n: random.bernoulli(n, 11, p=0.3),
}


def started(
    start: int = 0,
    stop: int | None = None,
    world: int | None = None,
    *,
    seed: int = 0,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
) -> SampleRandom:
    random = SampleRandom(seed)
    random.begin(step, start, stop, world, dtype, CPU)
    return random


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows_per_sample", [1, 2, 3])
def test_rows_of_shards_are_bitwise_the_rows_of_the_whole(kind: str, rows_per_sample: int) -> None:
    world = 53
    whole = started(0, world, world)
    expected = [KINDS[kind](whole, world * rows_per_sample) for _ in range(3)]
    for cuts in ([0, 1, 53], [0, 7, 8, 30, 53], [0, 26, 53], list(range(54))):
        drawn = []
        for start, stop in itertools.pairwise(cuts):
            shard = started(start, stop, world)
            drawn.append([KINDS[kind](shard, (stop - start) * rows_per_sample) for _ in range(3)])
        for whole_draw, *shards in zip(expected, *drawn, strict=True):
            assert torch.equal(torch.cat(shards), whole_draw)


def test_long_rows_are_bitwise_the_same_wherever_the_shard_starts() -> None:
    # Long enough for every vectorised loop, and for NumPy's buffers, to start at other places.
    for dtype in (torch.float32, torch.float64):
        whole = started(0, 9, 9).normal(9, 40_003, dtype=dtype)
        for start in range(9):
            assert torch.equal(
                started(start, start + 1, 9).normal(1, 40_003, dtype=dtype),
                whole[start : start + 1],
            )


def test_a_step_of_unknown_size_draws_the_rows_of_the_whole() -> None:
    assert torch.equal(started(0, 12, 12).normal(12, 3), started().normal(12, 3))
    assert torch.equal(started(0, 12, 12).normal(24, 3), started().normal(24, 3))


def test_rows_of_one_sample_stand_together() -> None:
    whole = started(0, 4, 4).normal(12, 2)
    assert torch.equal(started(1, 2, 4).normal(3, 2), whole[3:6])


def test_a_step_begun_again_draws_the_same() -> None:
    random = started(step=3)
    first, second = random.normal(5), random.normal(5)
    random.begin(3, 0, None, None, torch.float32, CPU)
    assert torch.equal(random.normal(5), first)
    assert torch.equal(random.normal(5), second)


def test_fresh_from_the_constructor_it_draws_as_one_shard() -> None:
    assert torch.equal(SampleRandom(4).normal(6, 2), started(seed=4).normal(6, 2))


@pytest.mark.parametrize("n", [0, 3, 5, -4])
def test_n_that_is_no_multiple_of_the_samples_names_shared(n: int) -> None:
    with pytest.raises(ValueError, match=rf"4 samples .* got n={n}.*self\.random\.shared"):
        started(4, 8, 8).normal(n, 3)


def test_arguments_that_make_no_sense_raise() -> None:
    random = started()
    with pytest.raises(ValueError, match="at least 1 row, got n=0"):
        random.normal(0)
    with pytest.raises(ValueError, match="got -1"):
        random.normal(4, std=-1)
    with pytest.raises(ValueError, match="got low=2, high=2"):
        random.uniform(4, low=2, high=2)
    with pytest.raises(ValueError, match="got low=0, high=0"):
        random.integers(4, high=0)
    with pytest.raises(ValueError, match=r"got 1\.5"):
        random.bernoulli(4, p=1.5)
    with pytest.raises(TypeError, match=r"torch.int64; .*integers"):
        random.normal(4, dtype=torch.int64)


def test_dtype_and_shape_are_the_module_s_or_those_asked_for() -> None:
    random = started(dtype=torch.float64)
    assert random.normal(4, 2, 3).shape == (4, 2, 3)
    assert random.normal(4).dtype == random.bernoulli(4).dtype == torch.float64
    assert random.uniform(4, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert random.integers(4, high=9).dtype == torch.int64
    assert random.integers(4, high=9, dtype=torch.int32).dtype == torch.int32
    assert random.bernoulli(4, dtype=torch.bool).dtype == torch.bool
    assert random.normal(4, 0, 2).shape == (4, 0, 2)
    assert random.normal(4, device="meta").device.type == "meta"


# Random numbers as such. Seeds are fixed, so that these do not fail now and then.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_numbers_are_normal(dtype: torch.dtype) -> None:
    drawn = started().normal(1000, 200, mean=1.0, std=2.0, dtype=dtype).double().numpy()
    assert stats.kstest(drawn.ravel(), stats.norm(1, 2).cdf).pvalue > 0.01
    assert len(np.unique(drawn)) > 0.98 * drawn.size
    # As far out as so many must reach, and further than 24 bits can (5.77 deviations).
    assert 4.0 < np.abs((drawn - 1) / 2).max() < 6.7


@pytest.mark.parametrize("word", [np.uint32, np.uint64])
def test_no_bits_give_an_infinite_normal_number(word: type[np.unsignedinteger]) -> None:
    # All zeros would be the logarithm of 0; they come once in four billion words.
    zeros, ones = np.zeros(8, word), np.full(8, np.iinfo(word).max, word)
    width = np.iinfo(word).bits
    assert 6.5 < _normal(zeros, 1.0).max() < (6.8 if width == 32 else 8.7)
    assert np.abs(_normal(ones, 1.0)).max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_numbers_are_uniform(dtype: torch.dtype) -> None:
    drawn = started().uniform(1000, 200, low=-1, high=3, dtype=dtype).double().numpy()
    assert stats.kstest(drawn.ravel(), stats.uniform(-1, 4).cdf).pvalue > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 0.1), (1.0, 1.5), (-3.0, -2.0)])
def test_uniform_stays_below_high(dtype: torch.dtype, low: float, high: float) -> None:
    drawn = started().uniform(1000, 1000, low=low, high=high, dtype=dtype)
    low_, high_ = torch.tensor([low, high], dtype=dtype)
    assert drawn.min() >= low_
    assert drawn.max() < high_


@pytest.mark.parametrize("high", [2, 10, 1000])
def test_integers_are_equally_likely(high: int) -> None:
    drawn = started().integers(1000, 100, low=-3, high=high - 3)
    counts = np.bincount((drawn + 3).numpy().ravel(), minlength=high)
    assert len(counts) == high
    assert stats.chisquare(counts).pvalue > 0.01


def test_integers_of_64_bits() -> None:
    drawn = started().integers(100_000, low=-(2**63), high=2**63).double().numpy()
    assert stats.kstest(drawn / 2.0**63, stats.uniform(-1, 2).cdf).pvalue > 0.01
    for bits in (30, 31, 32, 40, 62):
        drawn = started().integers(100_000, low=-(2**bits), high=2**bits + 1).double().numpy()
        assert stats.kstest(drawn / 2.0**bits, stats.uniform(-1, 2).cdf).pvalue > 0.01


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 2**31 - 1, 2**32 - 1, 2**32, 2**32 + 1])
def test_all_bits_set_do_not_reach_high(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = started()
    monkeypatch.setattr(random, "_bits", lambda *_: (np.full(4, 2**64 - 1, np.uint64), 0))
    assert random.integers(4, low=5, high=5 + count).max() <= 5 + count - 1


@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 0.5, 1.0])
def test_ones_come_with_their_probability(p: float) -> None:
    drawn = started().bernoulli(1000, 100, p=p)
    assert ((drawn == 0) | (drawn == 1)).all()
    ones = int(drawn.sum())
    if p in (0.0, 1.0):
        assert ones == p * drawn.numel()
    else:
        assert stats.binomtest(ones, drawn.numel(), p).pvalue > 0.01


# Some 150 comparisons are made: at this level, good numbers fail one of them with 0.2 %.
LEVEL = 1e-5


def assert_independent(a: Tensor, b: Tensor) -> None:
    """Of standard normal numbers: no correlation, and differences distributed as they must be."""
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    assert x.std() > 0
    assert y.std() > 0
    assert stats.pearsonr(x, y).pvalue > LEVEL
    assert stats.pearsonr(x**2, y**2).pvalue > LEVEL
    assert stats.spearmanr(x, y).pvalue > LEVEL
    assert stats.kstest((x - y) / 2**0.5, stats.norm.cdf).pvalue > LEVEL


def drawn(*, seed: int = 0, step: int = 0, draw: int = 0) -> Tensor:
    random = started(seed=seed, step=step)
    for _ in range(draw):
        random.normal(1)
    return random.normal(400, 64)


def test_rows_and_columns_are_independent() -> None:
    numbers = drawn()
    for lag in (1, 2, 3, 4, 8, 16, 64):
        assert_independent(numbers[lag:], numbers[:-lag])
    for lag in (1, 2, 3, 4, 5, 6, 7, 8, 16):
        assert_independent(numbers[:, lag:], numbers[:, :-lag])
    # All pairs at once: correlations of 64 independent columns over 400 rows.
    correlations = np.corrcoef(numbers.double().numpy().T)[np.triu_indices(64, 1)]
    assert stats.kstest(correlations * 400**0.5, stats.norm.cdf).pvalue > LEVEL


@pytest.mark.parametrize("what", ["draw", "step", "seed"])
def test_draws_steps_and_seeds_are_independent(what: str) -> None:
    base = drawn()
    for value in (1, 2, 3, 100):
        assert_independent(base, drawn(**{what: value}))


def test_seed_step_and_draw_are_not_interchangeable() -> None:
    assert_independent(drawn(seed=1), drawn(step=1))
    assert_independent(drawn(seed=1), drawn(draw=1))
    assert_independent(drawn(step=1), drawn(draw=1))
    assert_independent(drawn(seed=-1), drawn(seed=1))


def test_kinds_are_independent() -> None:
    uniform = started().uniform(400, 64)
    assert_independent(drawn(), torch.special.ndtri(uniform.double().clamp(1e-12, 1)))
    coins = started().bernoulli(400, 64).numpy().ravel()
    assert stats.pearsonr(coins, uniform.numpy().ravel()).pvalue > LEVEL


@pytest.mark.parametrize(
    "broken",
    [
        lambda x: torch.zeros_like(x),
        lambda x: x[:1].expand_as(x),
        lambda x: x[:, :1].expand_as(x),
        lambda x: x.view(-1, 2, 64)[:, :1].expand(-1, 2, -1).reshape_as(x),
    ],
    ids=["constant", "one row", "one column", "each row twice"],
)
def test_the_test_of_independence_finds(broken: Callable[[Tensor], Tensor]) -> None:
    numbers = broken(drawn())
    with pytest.raises(AssertionError):
        assert_independent(numbers[1:], numbers[:-1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_the_same_numbers_without_waiting() -> None:
    random = SampleRandom(0)
    for device in ("cpu", "cuda"):
        random.begin(1, 4, 8, 8, torch.float32, torch.device(device))
        random.normal(4, 100)  # the first pinned memory may wait
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        random.begin(1, 4, 8, 8, torch.float32, torch.device("cuda"))
        on_gpu = [random.normal(4, 100), random.shared.normal(5)]
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    random.begin(1, 4, 8, 8, torch.float32, CPU)
    for moved, here in zip(on_gpu, [random.normal(4, 100), random.shared.normal(5)], strict=True):
        assert torch.equal(moved.cpu(), here)
