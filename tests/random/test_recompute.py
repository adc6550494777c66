import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

from composefit.random.current import current_generator
from composefit.random.recompute import recomputation
from composefit.random.streams import Stream, hash_key, thread_local_generators


def noisy(x: Tensor) -> Tensor:
    return F.dropout(x.sin(), 0.5) * torch.rand_like(x) * x


def gradient(x: Tensor, *, checkpointed: bool, blocks: int = 3) -> Tensor:
    """Of a chain of blocks that draw, with draws between forward and backward as well."""
    x = x.clone().requires_grad_()
    y = x
    for _ in range(blocks):
        y = checkpoint(noisy, y, use_reentrant=False) if checkpointed else noisy(y)
    y = y * torch.rand(())
    (grad,) = torch.autograd.grad(y.sum(), x)
    return torch.cat([grad, torch.rand(2)])  # the live stream stands where it stood


def run_lane(shard: int, checkpointed: bool) -> Tensor:
    stream = Stream()
    stream.seed(hash_key(3, shard))
    x = torch.linspace(-1, 1, 200)
    with stream:
        return torch.stack([gradient(x, checkpointed=checkpointed) for _ in range(5)])


def test_recomputation_in_threads_draws_what_the_forward_drew() -> None:
    with thread_local_generators(), ThreadPoolExecutor(4) as pool:
        plain = [run_lane(shard, False) for shard in range(4)]
        for _ in range(10):
            together = list(pool.map(run_lane, range(4), [True] * 4))
            assert all(map(torch.equal, together, plain))


def test_recomputation_in_another_thread_draws_from_the_stream_of_its_forward() -> None:
    # As torch's own threads do that run backward on a device: they know nothing of the stream.
    # Without it they share the default generator, and disturb each other.
    x = torch.linspace(-1, 1, 200, requires_grad=True)
    default = torch.get_rng_state()
    drawn_from: list[torch.Generator | None] = []

    def block(x: Tensor) -> Tensor:
        drawn_from.append(current_generator())
        return noisy(x)

    with thread_local_generators(), Stream() as stream, ThreadPoolExecutor(1) as pool:
        stream.seed(1)
        expected = torch.autograd.grad(noisy(x).sum(), x)[0]
        stream.seed(1)
        loss = checkpoint(block, x, use_reentrant=False).sum()
        torch.rand(3)
        before = torch.get_rng_state()
        (grad,) = pool.submit(torch.autograd.grad, loss, x).result()
        assert torch.equal(grad, expected)
        assert torch.equal(torch.get_rng_state(), before)
        assert drawn_from == [stream.generator] * 2
    assert torch.equal(torch.get_rng_state(), default)


def test_sequential_and_early_stop_and_a_second_backward() -> None:
    x = torch.linspace(-1, 1, 200, requires_grad=True)
    with thread_local_generators(), Stream() as stream:
        stream.seed(1)
        expected = torch.autograd.grad(noisy(noisy(x)).sum(), x)[0]
        for early_stop in (True, False):
            stream.seed(1)
            with set_checkpoint_early_stop(early_stop):
                y = checkpoint_sequential([noisy, noisy], 2, x, use_reentrant=False).sum()
            first = torch.autograd.grad(y, x, retain_graph=True)[0]
            second = torch.autograd.grad(y, x)[0]
            assert torch.equal(first, expected)
            assert torch.equal(second, expected)


def test_preserve_rng_state_off_draws_anew_from_the_stream() -> None:
    x = torch.ones(200, requires_grad=True)
    default = torch.get_rng_state()
    with thread_local_generators(), Stream() as stream:
        stream.seed(1)
        y = checkpoint(noisy, x, use_reentrant=False, preserve_rng_state=False)
        forward = torch.get_rng_state()
        torch.autograd.grad(y.sum(), x)
        assert not torch.equal(torch.get_rng_state(), forward)
    assert torch.equal(torch.get_rng_state(), default)


def test_reentrant_checkpointing_is_refused_in_a_stream_only() -> None:
    x = torch.ones(3, requires_grad=True)
    with thread_local_generators():
        with Stream(), pytest.raises(RuntimeError, match="use_reentrant=False"):
            checkpoint(noisy, x, use_reentrant=True)
        checkpoint(noisy, x, use_reentrant=True).sum().backward()
    with recomputation(Notes()), pytest.raises(RuntimeError, match="use_reentrant=False"):
        checkpoint(noisy, x, use_reentrant=True)
    checkpoint(noisy, x, use_reentrant=True).sum().backward()


class Notes:
    """A guard that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def forward(self) -> str:
        self.told.append("forward")
        return f"token {len(self.told)}"

    @contextlib.contextmanager
    def recompute(self, token: str) -> Iterator[None]:
        self.told.append(f"begin {token}")
        try:
            yield
        finally:
            self.told.append(f"end {token}")


def test_the_guard_is_told_without_a_stream_and_in_other_threads() -> None:
    guard = Notes()
    x = torch.ones(3, requires_grad=True)
    with recomputation(guard):
        y = checkpoint(
            torch.sin, checkpoint(torch.sin, x, use_reentrant=False), use_reentrant=False
        )
        assert guard.told == ["forward", "forward"]
    with ThreadPoolExecutor(1) as pool:  # after the block, and where no guard is set
        pool.submit(torch.autograd.grad, y.sum(), x).result()
    assert guard.told[2:] == ["begin token 2", "end token 2", "begin token 1", "end token 1"]


def test_what_the_guard_raises_comes_out_of_backward() -> None:
    class Refusing(Notes):
        @contextlib.contextmanager
        def recompute(self, token: str) -> Iterator[None]:
            raise ValueError("the weights were updated")
            yield

    x = torch.ones(3, requires_grad=True)
    with recomputation(Refusing()):
        y = checkpoint(torch.sin, x, use_reentrant=False)
        with pytest.raises(ValueError, match="the weights were updated"):
            torch.autograd.grad(y.sum(), x)


def test_guards_belong_to_their_thread_and_nest() -> None:
    outer, inner, other = Notes(), Notes(), Notes()
    x = torch.ones(3, requires_grad=True)
    entered, left = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with recomputation(other):
            entered.set()
            left.wait()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    entered.wait()
    checkpoint(torch.sin, x, use_reentrant=False)
    with recomputation(outer):
        with recomputation(inner):
            checkpoint(torch.sin, x, use_reentrant=False)
        checkpoint(torch.sin, x, use_reentrant=False)
        checkpoint(torch.sin, x, use_reentrant=False)
    left.set()
    thread.join()
    checkpoint(torch.sin, x, use_reentrant=False)
    assert [len(guard.told) for guard in (outer, inner, other)] == [2, 1, 0]


def test_torch_is_put_back() -> None:
    def changed() -> list[bool]:
        module = torch.utils.checkpoint
        return [
            module._CheckpointFrame.__module__ != module.__name__,
            "apply" in vars(module.CheckpointFunction),
        ]

    assert changed() == [False, False]
    with thread_local_generators(), recomputation(Notes()):
        assert changed() == [True, True]
    assert changed() == [False, False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_checkpointing_recomputes_what_it_drew() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def block(x: Tensor) -> Tensor:
        return checkpoint(lambda y: F.dropout(y.sin(), 0.5).cos(), x, use_reentrant=False)

    x = torch.linspace(0.5, 1, 200, requires_grad=True)
    with thread_local_generators():
        for seed in range(3):
            with Stream() as stream:
                stream.seed(seed)
                y = block(x)
                torch.rand(3)
                (grad,) = torch.autograd.grad(y.sum(), x)
                kept = y < 1  # cos(0) where dropped
                assert torch.equal(grad != 0, kept)
                assert 0 < kept.sum() < len(x)
