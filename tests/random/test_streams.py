import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from composefit.random.streams import KERNELS, Stream, hash_key, thread_local_generators

THREADS = 4


def distribution(name: str, *parameters: float) -> Callable[[], torch.Tensor]:
    kind = getattr(torch.distributions, name)
    return lambda: kind(*(torch.full((50,), p) for p in parameters)).sample()


def module(make: Callable[[], nn.Module], *shape: int) -> Callable[[], torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built, x = make().train(), torch.randn(shape)

    def draw() -> torch.Tensor:
        out = built(x)
        return (out[0] if isinstance(out, tuple) else out).detach()

    return draw


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        return self.attention(x, x, x)


ones = torch.ones(40, 30)
positive = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) + 0.5
queries = torch.randn(2, 2, 16, 8, generator=torch.Generator().manual_seed(0))

SOURCES: dict[str, Callable[[], torch.Tensor]] = {
    "rand": lambda: torch.rand(100),
    "randn": lambda: torch.randn(100),
    "randint": lambda: torch.randint(1000, (100,)),
    "randint, 64 bits": lambda: torch.randint(-(2**62), 2**62, (100,)),
    "randperm": lambda: torch.randperm(100),
    "rand_like": lambda: torch.rand_like(ones),
    "randn_like": lambda: torch.randn_like(ones),
    "randint_like": lambda: torch.randint_like(ones, 1000),
    "rand, float64": lambda: torch.rand(100, dtype=torch.float64),
    "randn, complex": lambda: torch.randn(100, dtype=torch.complex64),
    "normal, tensor and tensor": lambda: torch.normal(ones, positive),
    "normal, tensor and float": lambda: torch.normal(ones, 2.0),
    "normal, float and tensor": lambda: torch.normal(0.0, positive),
    "normal, floats": lambda: torch.normal(0.0, 1.0, (100,)),
    "normal, out": lambda: torch.normal(ones, positive, out=torch.empty(40, 30)),
    "bernoulli": lambda: torch.bernoulli(positive / 2),
    "bernoulli, p": lambda: torch.bernoulli(ones, 0.5),
    "bernoulli, out": lambda: torch.bernoulli(positive / 2, out=torch.empty(40, 30)),
    "bernoulli_": lambda: torch.empty(100).bernoulli_(0.5),
    "bernoulli_, tensor": lambda: torch.empty(40, 30).bernoulli_(positive / 2),
    "uniform_": lambda: torch.empty(100).uniform_(-1, 1),
    "normal_": lambda: torch.empty(100).normal_(),
    "random_": lambda: torch.empty(100).random_(),
    "random_, to": lambda: torch.empty(100).random_(9),
    "exponential_": lambda: torch.empty(100).exponential_(),
    "geometric_": lambda: torch.empty(100).geometric_(0.1),
    "cauchy_": lambda: torch.empty(100).cauchy_(),
    "log_normal_": lambda: torch.empty(100).log_normal_(),
    "poisson": lambda: torch.poisson(positive * 9),
    "binomial": lambda: torch.binomial(ones * 20, ones / 2),
    "multinomial": lambda: torch.multinomial(positive, 5),
    "multinomial, replacement": lambda: torch.multinomial(positive, 5, replacement=True),
    "multinomial, out": lambda: torch.multinomial(
        positive, 5, out=torch.empty(0, dtype=torch.int64)
    ),
    "dropout": lambda: F.dropout(ones, 0.5),
    "native_dropout": lambda: torch.native_dropout(ones, 0.5, True)[0],
    "feature dropout": lambda: F.dropout1d(torch.ones(9, 9, 9), 0.5),
    "alpha dropout": lambda: F.alpha_dropout(ones, 0.5, training=True),
    "feature alpha dropout": lambda: F.feature_alpha_dropout(torch.ones(9, 9, 9), 0.5, True),
    "rrelu": lambda: F.rrelu(-ones, training=True),
    "rrelu_": lambda: F.rrelu(-ones, training=True, inplace=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(positive, hard=False),
    "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(
        queries, queries, queries, dropout_p=0.5
    ),
    "LSTM dropout": module(lambda: nn.LSTM(8, 8, 3, dropout=0.5), 5, 3, 8),
    "GRU dropout": module(lambda: nn.GRU(8, 8, 3, dropout=0.5), 5, 3, 8),
    "MultiheadAttention": module(Attention, 4, 9, 8),
    "TransformerEncoderLayer": module(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True), 4, 9, 8
    ),
    "FractionalMaxPool2d": module(lambda: nn.FractionalMaxPool2d(2, output_size=5), 2, 3, 12, 12),
    "nn.init": lambda: nn.init.kaiming_normal_(torch.empty(20, 20)),
    "nn.init.trunc_normal_": lambda: nn.init.trunc_normal_(torch.empty(20, 20)),
    "nn.init.orthogonal_": lambda: nn.init.orthogonal_(torch.empty(20, 20)),
    "nn.Linear": lambda: nn.Linear(9, 9).weight.detach(),
    "Normal": distribution("Normal", 0.0, 1.0),
    "Gamma": distribution("Gamma", 2.0, 1.0),
    "Beta": distribution("Beta", 2.0, 1.0),
    "Dirichlet": lambda: torch.distributions.Dirichlet(torch.ones(5)).sample((20,)),
    "StudentT": distribution("StudentT", 3.0),
    "Laplace": distribution("Laplace", 0.0, 1.0),
    "VonMises": distribution("VonMises", 0.0, 1.0),
    "Categorical": lambda: torch.distributions.Categorical(positive).sample(),
    "vmap": lambda: torch.vmap(lambda x: F.dropout(x, 0.5), randomness="different")(ones),
    "inference mode": torch.inference_mode()(lambda: torch.randn(100)),
}


def draws_in_streams(draw: Callable[[], torch.Tensor], times: int) -> list[torch.Tensor]:
    """What each of the threads draws, all at once, each in a stream of its own."""
    together = threading.Barrier(THREADS)

    def lane(shard: int) -> torch.Tensor:
        stream = Stream()
        stream.seed(hash_key(1, shard))
        together.wait()
        with stream:
            return torch.stack([draw() for _ in range(times)])

    with thread_local_generators(), ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lane, range(THREADS)))


def draws_on_one_thread(draw: Callable[[], torch.Tensor], times: int) -> list[torch.Tensor]:
    drawn = []
    with thread_local_generators():
        for shard in range(THREADS):
            stream = Stream()
            stream.seed(hash_key(1, shard))
            with stream:
                drawn.append(torch.stack([draw() for _ in range(times)]))
    return drawn


@pytest.mark.parametrize("source", SOURCES)
def test_threads_draw_what_their_streams_give_on_one_thread(source: str) -> None:
    before = torch.get_rng_state()
    alone = draws_on_one_thread(SOURCES[source], 8)
    for _ in range(2):
        assert all(map(torch.equal, draws_in_streams(SOURCES[source], 8), alone))
    assert not torch.equal(alone[0], alone[1]), "two streams give the same"
    assert not torch.equal(alone[0][0], alone[0][1]), "a stream repeats itself"
    assert torch.equal(torch.get_rng_state(), before), "something was not drawn from the stream"


def test_a_hundred_runs_of_four_threads_are_bitwise_equal() -> None:
    def mixed() -> torch.Tensor:
        x = F.dropout(torch.ones(500), 0.5) + torch.randn(500)
        return x + torch.rand_like(x) + torch.empty(500).exponential_()

    alone = draws_on_one_thread(mixed, 4)
    for _ in range(100):
        assert all(map(torch.equal, draws_in_streams(mixed, 4), alone))


def test_a_stream_gives_what_its_generator_gives() -> None:
    stream = Stream()
    stream.seed(5)
    expected = torch.randn(100, generator=torch.Generator().manual_seed(5))
    with thread_local_generators(), stream:
        assert torch.equal(torch.randn(100), expected)


def test_the_list_of_kernels_is_that_of_torch() -> None:
    # An operator that a new torch adds must be found here, not by a user's changing masks.
    found = set()
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name + (f".{schema.overload_name}" if schema.overload_name else "")
        if (
            schema.name.startswith("aten::")
            and any(argument.name == "generator" for argument in schema.arguments)
            and name in torch._C._dispatch_get_all_op_names()
            and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
        ):
            found.add(name.removeprefix("aten::"))
    assert found == set(KERNELS)


def test_an_explicit_generator_is_untouched() -> None:
    def draws() -> list[torch.Tensor]:
        own = torch.Generator().manual_seed(3)
        return [
            torch.randn(9, generator=own),
            torch.empty(9).uniform_(generator=own),
            torch.randperm(9, generator=own),
            torch.poisson(ones, own),
            torch._standard_gamma(ones, own),
            torch.multinomial(positive, 2, generator=own),
            torch.rrelu(-ones, 0.1, 0.3, True, own),
        ]

    expected = draws()
    stream = Stream()
    with thread_local_generators(), stream:
        before = torch.get_rng_state()
        assert all(map(torch.equal, draws(), expected))
        assert torch.equal(torch.get_rng_state(), before)


def test_a_thread_without_a_stream_draws_from_the_default_generator() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        expected = [torch.randn(9), F.dropout(torch.ones(9)), torch.randperm(9)]
        torch.manual_seed(2)
        with thread_local_generators():
            drawn = [torch.randn(9), F.dropout(torch.ones(9)), torch.randperm(9)]
    assert all(map(torch.equal, drawn, expected))


def test_streams_nest_and_go_on_where_they_stopped() -> None:
    outer, inner = Stream(), Stream()
    outer.seed(1)
    inner.seed(2)
    with thread_local_generators():
        with outer:
            first = torch.randn(2)
            with inner:
                second = torch.randn(2)
                with outer:
                    third = torch.randn(2)
                fourth = torch.randn(2)
        with pytest.raises(ZeroDivisionError), inner:
            raise ZeroDivisionError
        default = torch.default_generator.get_state()
        torch.randn(2)
        assert not torch.equal(torch.default_generator.get_state(), default)
    for seed, drawn in ((1, [first, third]), (2, [second, fourth])):
        generator = torch.Generator().manual_seed(seed)
        expected = [torch.randn(2, generator=generator) for _ in range(2)]
        assert all(map(torch.equal, drawn, expected))


def test_installed_once_and_removed_by_the_last_one_out() -> None:
    def installed() -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key("aten::normal_", "BackendSelect")

    first, second = thread_local_generators(), thread_local_generators()
    assert not installed()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert installed()
    second.__exit__(None, None, None)
    assert not installed()
    assert torch.random.default_generator is torch.default_generator


def test_a_stream_without_the_kernels_raises() -> None:
    with pytest.raises(RuntimeError, match="thread_local_generators"), Stream():
        pass


def test_big_draws_leave_the_other_threads_running() -> None:
    # With the GIL held during a draw, the dropout of all threads takes turns.
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.0005)

    big = torch.empty(20_000_000)
    other = threading.Thread(target=tick)
    with thread_local_generators(), Stream():
        other.start()
        before = ticks
        big.bernoulli_(0.5)
        during = ticks - before
        done.set()
    other.join()
    assert during > 5


def test_seeding_and_forking_speak_of_the_stream() -> None:
    from torch import get_rng_state, manual_seed

    default = torch.get_rng_state()
    with thread_local_generators(), Stream() as stream:
        manual_seed(4)
        assert stream.generator.initial_seed() == 4
        assert torch.equal(get_rng_state(), stream.generator.get_state())
        before = torch.get_rng_state()
        with torch.random.fork_rng(devices=()):
            torch.randn(9)
        assert torch.equal(stream.generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), default)


def test_fake_and_meta_tensors_go_through() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with thread_local_generators(), Stream():
        before = torch.get_rng_state()
        with FakeTensorMode():
            assert F.dropout(torch.randn(3, 4), 0.5).shape == (3, 4)
            assert torch.randperm(5).shape == (5,)
        assert torch.empty(3, device="meta").normal_().device.type == "meta"
        assert torch.randn(3, device="meta").shape == (3,)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:.*Overriding a previously registered kernel")
def test_kernels_of_other_devices_do_not_get_the_stream_s_generator() -> None:
    # A CUDA kernel would refuse it.
    got = []

    def spy(self: torch.Tensor, *_: float, generator: torch.Generator | None = None) -> Any:
        got.append(generator)
        return self

    library = torch.library.Library("aten", "IMPL")
    library.impl("normal_", spy, "Meta")
    with thread_local_generators(), Stream():
        torch.empty(3, device="meta").normal_()
    del library
    assert got == [None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_from_its_own_generator() -> None:
    draws = []
    for context in (contextlib.nullcontext(), thread_local_generators()):
        torch.cuda.manual_seed(1)
        with context, Stream() if draws else contextlib.nullcontext():
            draws.append(F.dropout(torch.randn(100, device="cuda"), 0.5))
    assert torch.equal(*draws)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_functions_draw_from_the_stream() -> None:
    @torch.compile(backend="aot_eager")
    def noisy(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5) + torch.randn_like(x)

    def draw() -> torch.Tensor:
        x = torch.ones(50, requires_grad=True)
        out = noisy(x)
        return torch.cat([out, *torch.autograd.grad(out.sum(), x)]).detach()

    drawn = []
    with thread_local_generators():
        draw()
        for seed in (1, 1, 2):
            with Stream() as stream:
                stream.seed(seed)
                drawn.append(draw())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_keys_are_spread_in_their_low_bits_too() -> None:
    keys = [
        hash_key(seed, step, shard) for seed in (0, 1) for step in range(500) for shard in (0, 1)
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)
    for bit in range(64):
        share = sum(key >> bit & 1 for key in keys) / len(keys)
        assert abs(share - 0.5) < 5 * 0.5 / len(keys) ** 0.5
    assert hash_key(-1) == hash_key(2**64 - 1)
    assert len({hash_key(), hash_key(0), hash_key(0, 0), hash_key(0, 1), hash_key(1, 0)}) == 5


def test_keys_are_the_same_everywhere() -> None:
    # The first outputs of SplitMix64 from state 0, as its reference implementation gives them.
    assert hash_key(0) == 0xE220A8397B1DCDAF
