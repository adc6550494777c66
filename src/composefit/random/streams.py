"""Streams: torch's own draws (dropout, `torch.randn`, ...), one sequence for each shard.

torch's CPU kernels draw from one generator that all threads share, so the masks of shards that
run concurrently depend on who comes first. Passing `generator=` is no way out: dropout, LSTM,
attention and most other sources do not take one. So the kernels themselves are told: while
`thread_local_generators` is open, a draw without a generator of its own takes the one of the
stream that its thread has entered.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch

from composefit.random.current import current_generator, entered
from composefit.random.installation import Installation
from composefit.random.recompute import checkpoints

# Every operator that has a CPU kernel and takes a generator. All other random operators
# (dropout, `randn`, `rand_like`, `native_dropout`, LSTM, attention, ...) end in these.
KERNELS = (
    "_sample_dirichlet",
    "_standard_gamma",
    "bernoulli.out",
    "bernoulli_.Tensor",
    "bernoulli_.float",
    "binomial",
    "cauchy_",
    "exponential_",
    "geometric_",
    "log_normal_",
    "multinomial",
    "multinomial.out",
    "normal.Tensor_Tensor",
    "normal.Tensor_Tensor_out",
    "normal.Tensor_float",
    "normal.Tensor_float_out",
    "normal.float_Tensor",
    "normal.float_Tensor_out",
    "normal_",
    "poisson",
    "random_",
    "random_.from",
    "random_.to",
    "randperm.generator_out",
    "rrelu_with_noise",
    "rrelu_with_noise.out",
    "rrelu_with_noise_",
    "uniform_",
)

_MASK = 0xFFFF_FFFF_FFFF_FFFF


def hash_key(*parts: int) -> int:
    """Mix integers (a seed, a step, a shard, ...) into one well-spread key of 64 bits.

    Each part goes through the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable
    Pseudorandom Number Generators, 2014), so that neighbouring steps and shards get unrelated
    keys. Order and number of the parts count.

    Args:
        parts: Integers of any sign; of larger ones the low 64 bits count.

    Returns:
        An integer from 0 to 2**64 - 1, the same in every process and version.

    Example:
        >>> hash_key(0, 7) == hash_key(0, 7), hash_key(0, 7) == hash_key(7, 0)
        (True, False)
    """
    mixed = 0
    for part in parts:
        mixed = (mixed + part + 0x9E37_79B9_7F4A_7C15) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
        mixed ^= mixed >> 31
    return mixed


class Stream:
    """torch's own draws of one shard.

    Inside `with stream:`, what this thread draws on the CPU without a `generator=` comes from
    the stream, and `torch.manual_seed`, `torch.get_rng_state`, `torch.random.fork_rng` speak of
    it. It goes on where it stopped when it is entered again, may be entered while it or another
    one is, and leaving it restores what was there before. One thread at a time may use it.

    Raises:
        RuntimeError: when entered outside of `thread_local_generators`, where it would have
            no effect.

    Example:
        >>> stream = Stream()
        >>> with thread_local_generators(), stream:
        ...     stream.seed(hash_key(0, 1))
        ...     first = torch.rand(3)
        ...     stream.seed(hash_key(0, 1))
        ...     torch.equal(first, torch.rand(3))
        True
    """

    __slots__ = ("generator",)

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def seed(self, key: int) -> None:
        """Start the stream's sequence anew.

        torch's CPU generator (MT19937) looks at the low 32 bits only, so the key must be well
        spread there: see `hash_key`.

        Args:
            key: An integer from 0 to 2**64 - 1.
        """
        self.generator.manual_seed(key)

    def __enter__(self) -> Self:
        if not _kernels.users:
            raise RuntimeError(
                "expected a Stream to be entered while torch's kernels are told to use streams: "
                "it would have no effect. Write `with thread_local_generators():` around it."
            )
        entered.generators.append(self.generator)
        return self

    def __exit__(self, *exception: object) -> None:
        entered.generators.pop()


@contextlib.contextmanager
def thread_local_generators() -> Iterator[None]:
    """Let torch's random CPU kernels draw from the stream that their thread has entered.

    A thread without a stream draws from torch's default generator as ever, and a draw with a
    `generator=` of its own is untouched; so are devices other than the CPU. Activation
    checkpointing in a stream draws the same again when it recomputes; `use_reentrant=True` is
    refused there. May be open several times at once: the first one in installs, the last one
    out removes.
    """
    with _kernels.used(), checkpoints.used():
        yield


class _CurrentGenerator:
    """What `torch.random` takes for the default generator: the one that draws come from.

    Without it `torch.manual_seed` and `fork_rng` would have no effect in a stream, and
    checkpointing, compiled or not, would restore the state of a generator that nobody uses.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(current_generator() or torch.default_generator, name)


_library: Any = None


def _install() -> None:
    # At BackendSelect, not at CPU. Dispatch passes it on the way to the CPU kernel, after
    # autograd, functorch, fake tensors and tracing had their turn, so none of these sees the
    # generator. It is free for these operators: nothing is replaced, nothing warns, and the
    # original is reached by dispatching on, which releases the GIL. (Calling a kernel taken
    # with `torch.library.get_kernel` holds it, so that all threads' dropout would take turns.)
    global _library
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for kernel in KERNELS:
        library.impl(kernel, _drawing_from_stream(kernel), "BackendSelect", with_keyset=True)
    _library = library
    # The name that the functions of torch.random look up, whoever imported them.
    vars(torch.random)["default_generator"] = _CurrentGenerator()


def _uninstall() -> None:
    global _library
    _library = None  # takes its kernels with it
    vars(torch.random)["default_generator"] = torch.default_generator


_kernels = Installation(_install, _uninstall)


def _drawing_from_stream(kernel: str) -> Callable[..., Any]:
    name, _, overload = kernel.partition(".")
    operator = getattr(getattr(torch.ops.aten, name), overload or "default")
    redispatch = operator.redispatch
    # A generator may come by position; arguments at the end that are None do not come at all.
    before_generator = [argument.name for argument in operator._schema.arguments].index("generator")
    cpu = torch.DispatchKey.CPU
    remaining = torch._C._dispatch_keyset_full_after(torch.DispatchKey.BackendSelect)

    def draw(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        generators = entered.generators
        if (
            generators
            and len(args) <= before_generator
            and kwargs.get("generator") is None
            and keyset.has(cpu)
        ):
            kwargs["generator"] = generators[-1]
        return redispatch(keyset & remaining, *args, **kwargs)

    return draw
