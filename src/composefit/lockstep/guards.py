"""What a step must not leave behind, and what would otherwise go wrong in silence.

Modes (grad, inference, autocast, device and dispatch modes) are thread-local: they are carried into
the workers and compared at every yield. Stale graphs and graphs used up are found by autograd, and
explained here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from composefit.losses import Loss, as_loss

if TYPE_CHECKING:
    from composefit.lockstep.shard import Shard

_NAMES = (
    "grad mode",
    "inference mode",
    "autocast",
    "the stack of function modes (such as `with torch.device(...)`)",
    "the stack of dispatch modes",
)


def reader_of_modes(device_type: str) -> Callable[[], tuple[Any, ...]]:
    """A function that reads this thread's modes, to be compared; it runs twice at every yield."""
    grad = torch.is_grad_enabled
    inference = torch.is_inference_mode_enabled
    any_autocast = torch._C._is_any_autocast_enabled
    functions = torch._C._len_torch_function_stack
    dispatches = torch._C._len_torch_dispatch_stack

    def modes() -> tuple[Any, ...]:
        return (
            grad(),
            inference(),
            any_autocast() and _autocasts(device_type),
            functions(),
            dispatches(),
        )

    return modes


def _autocasts(device_type: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


def left_open(expected: tuple[Any, ...], found: tuple[Any, ...]) -> RuntimeError:
    """The error for a `with` left open across a yield, to be thrown in at the user's line."""
    changed = [
        f"{name} is {now} and was {before}"
        for name, before, now in zip(_NAMES, expected, found, strict=True)
        if before != now
    ]
    return RuntimeError(
        f"a mode was left changed at a yield or return: {', '.join(changed)}. The other shards run "
        "in between and would inherit it: close the `with` before the yield, and open it again "
        "afterwards"
    )


class Ambient:
    """The modes of the thread that called the step, for its workers.

    Made in the calling thread, entered in every worker's. Grad mode is the step's own and not
    carried.
    """

    def __init__(self, device_type: str) -> None:
        self.function_modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        self.dispatch_modes = _get_current_dispatch_mode_stack()
        self.autocast: tuple[str, torch.dtype] | None = None
        if torch.is_autocast_enabled(device_type):
            self.autocast = (device_type, torch.get_autocast_dtype(device_type))
        self.inference = torch.is_inference_mode_enabled()
        modes = self.function_modes or self.dispatch_modes or self.autocast
        self.empty = not (modes or self.inference)

    def entered(self) -> AbstractContextManager[object]:
        """A context that gives this thread the caller's modes."""
        if self.empty:
            return nullcontext()
        stack = ExitStack()
        if self.inference:
            stack.enter_context(torch.inference_mode())
        for mode in [*self.function_modes, *self.dispatch_modes]:
            # A device context is a function mode that keeps state of its own: make a new one.
            stack.enter_context(getattr(mode, "device", None) or mode)
        if self.autocast:
            stack.enter_context(torch.autocast(*self.autocast))
        return stack


_STALE = re.compile("modified by an inplace operation")
_ONE_SAMPLE = re.compile("Expected more than 1 (value per channel|spatial element) when training")
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|std::bad_alloc")
_FREED = re.compile("backward through the graph a second time|saved tensors after they have")


#: The code of a step and the line at which it stands (None where it has returned).
Place: TypeAlias = tuple[CodeType | None, int | None]


def in_words(place: Place) -> str:
    """A place as file and line."""
    code, line = place
    if code is None:
        return "an unknown place"
    return f"{code.co_filename}:{line or code.co_firstlineno}"


def explain(error: RuntimeError, name: str, updates: Sequence[tuple[str, Place]]) -> RuntimeError:
    """Autograd's two errors in the words of a step, with the yields at fault.

    Args:
        error: what autograd raised.
        name: whose loss it was.
        updates: the optimizers that this step has updated so far, and where.
    """
    done = " and ".join(f"{updated!r} ({in_words(place)})" for updated, place in updates)
    if updates and (_STALE.search(str(error)) or isinstance(error, StaleGraphError)):
        return StaleGraphError(
            f"the loss of {name!r} goes through weights that the update of {done} has changed "
            "since it was computed: compute it (call the network again) after that yield, or "
            f"update both at once with one `yield {{...}}`. autograd says: {error}"
        )
    if updates and _FREED.search(str(error)):
        return RuntimeError(
            f"the loss of {name!r} goes through a graph that the update of {done} has used up: "
            "write `yield Update({...}, retain_graph=True)` there, or compute it again after that "
            "yield"
        )
    return error


def explain_again(error: Exception, name: str, place: Place) -> Exception:
    """The same where a loss that is a function was evaluated anew."""
    text = str(error)
    if _STALE.search(text) or _FREED.search(text) or isinstance(error, StaleGraphError):
        return StaleGraphError(
            f"the loss function of {name!r} goes through what the step has computed before it was "
            f"yielded ({in_words(place)}), with weights that its optimizer has changed since: "
            f"compute it within the function. autograd says: {error}"
        )
    return error


def foreign_mean(loss: Tensor) -> str | None:
    """What a loss averages over where that is not its samples; None where nothing shows it.

    Looks for `cross_entropy` and `nll_loss` with class weights or ignored targets in the graph:
    their mean divides by the sum of the weights of the targets that count. Costs a walk over the
    graph, and waits for the device.

    Args:
        loss: a 0-dim tensor, its graph not yet used up.
    """
    waiting = [loss.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(after for after, _ in node.next_functions)
        if node.name() in _NLL and node._saved_reduction == _MEAN:  # type: ignore[attr-defined]
            if node._saved_weight is not None:  # type: ignore[attr-defined]
                return "class weights (weight=...)"
            counted = node._saved_total_weight.item()  # type: ignore[attr-defined]
            targets = node._saved_target.numel()  # type: ignore[attr-defined]
            if counted != targets:
                return f"the {counted:.0f} of {targets} targets that are not ignored (ignore_index)"
    return None


def foreign_means(losses: Iterable[Tensor | Loss]) -> Iterator[str]:
    """The same for the terms of losses that stand for sample means."""
    for loss in losses:
        terms = loss.terms if isinstance(loss, Loss) else as_loss(loss, "the loss").terms
        for term in terms:
            found = None
            if term.weight is None:
                with suppress(RuntimeError):  # a graph that is used up tells nothing
                    found = foreign_mean(term.total)
            if found is not None:
                yield found


_NLL = {"NllLossBackward0", "NllLoss2DBackward0"}
_MEAN = 1  # what F.cross_entropy's reduction="mean" is to the kernel


def refuse_own_tensors(functions: Sequence[Callable[..., Any]]) -> None:
    """Refuse functions for `Once` that hold tensors of their shards: all but one would be lost."""
    first, *others = [[id(tensor) for tensor in _held_tensors(function)] for function in functions]
    if any(other != first for other in others):
        raise RuntimeError(
            "the function given to Once uses a tensor of its shard, but is called once for all "
            "shards, so that the others' rows would be lost: hand the tensor over, "
            "`Once(function, tensor)`; the function then gets the rows of all shards"
        )


def _held_tensors(function: object) -> list[Tensor]:
    held: list[object] = []
    if isinstance(function, partial):
        held += [*function.args, *function.keywords.values()]
        function = function.func
    held += getattr(function, "__defaults__", None) or ()
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # a variable that has no value yet
            held.append(cell.cell_contents)
    return [value for value in held if isinstance(value, Tensor)]


def refuse_hooks(parameters: Sequence[Parameter], name: str) -> None:
    """Refuse tensor hooks on parameters, of which each shard's backward would call its own."""
    if any(parameter._backward_hooks for parameter in parameters):
        raise RuntimeError(
            f"a parameter of optimizer {name!r} has a tensor hook (register_hook), which would see "
            "the gradient of each shard in place of the total: use "
            "register_post_accumulate_grad_hook or on_before_optimizer_step, which run once, on "
            "the total"
        )


def hints(error: BaseException, shards: Sequence[Shard], microbatch: int | None) -> Iterator[str]:
    """What to do about errors of torch's that come of how a batch was cut.

    Args:
        error: what was raised in a shard.
        shards: those of the step.
        microbatch: no shard holds more samples than this; None for no limit.
    """
    samples = [shard.known_samples for shard in shards]
    if 1 in samples and len(samples) > 1 and _ONE_SAMPLE.search(str(error)):
        yield (
            "a shard of this step holds a single sample, which BatchNorm cannot train on: set "
            "samples_per_group = 2 on the module, so that no shard gets less (and drop_last=True "
            "on the loader, where its last batch may hold one sample)"
        )
    if _is_out_of_memory(error):
        yield _less_memory(shards, microbatch)


def _is_out_of_memory(error: BaseException) -> bool:
    """Of a device, of Python's or NumPy's, or of torch's allocator on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def _less_memory(shards: Sequence[Shard], microbatch: int | None) -> str:
    sizes: list[int] = []
    with suppress(Exception):  # of a single shard nobody has asked the size, nor need it be known
        sizes = [shard.samples for shard in shards]
    if not sizes:
        return (
            f"memory ran out in a step of {len(shards)} shard{'s' * (len(shards) > 1)} "
            f"(microbatch_size={microbatch}): "
            "write Trainer(microbatch_size=...), at most so many samples in a shard"
        )
    low, high = min(sizes), max(sizes)
    each = f"{low}" if low == high else f"{low} to {high}"
    held = (
        f"memory ran out in a step of {sum(sizes)} samples in {len(sizes)} "
        f"shard{'s' * (len(sizes) > 1)} of {each} (microbatch_size={microbatch}): "
    )
    if high == 1:
        return held + (
            "a shard cannot hold less than one sample, so compute in less memory, with "
            'precision="bf16-mixed" or torch.utils.checkpoint'
        )
    return held + (
        f"write Trainer(microbatch_size={(high + 1) // 2}), which makes the same update from "
        "shards of at most so many samples; a smaller batch needs less, too"
    )


class StaleGraphError(RuntimeError):
    """A graph was built before an update of weights that it goes through."""


class StaleWeights:
    """Finds weights that were updated between a checkpointed forward and its recomputation.

    Activation checkpointing runs the forward again during the backward, with the weights of then:
    autograd's version check sees nothing, and the gradient is silently that of other weights.
    """

    def __init__(self) -> None:
        self.stepped: list[Sequence[Tensor]] = []  # parameters, update by update, of this step

    def forward(self) -> int:
        """Called when a checkpointed forward starts: the number of updates so far."""
        return len(self.stepped)

    def recompute(self, before: int) -> AbstractContextManager[object]:
        """Entered around the recomputation."""
        changed = {id(p) for parameters in self.stepped[before:] for p in parameters}
        return _Watch(changed) if changed else nullcontext()


class _Watch(TorchFunctionMode):
    """Raises when a torch function is given one of these tensors."""

    def __init__(self, ids: set[int]) -> None:
        super().__init__()
        self.ids = ids

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(id(leaf) in self.ids for leaf in _leaves((args, kwargs))):
            raise StaleGraphError(
                "activation checkpointing computes a part again whose weights were updated since"
            )
        return func(*args, **(kwargs or {}))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


class NoParametrizationCache(dict[Any, Any]):
    """Stands for the cache of `parametrize.cached()` while shards run side by side.

    That is one cache for all threads: a shard would find another's weights in it.
    """

    def get(self, key: Any, default: Any = None) -> Any:
        """Refuse.

        Raises:
            RuntimeError: always; it says what to do instead.
        """
        raise RuntimeError(
            "torch.nn.utils.parametrize.cached() keeps one cache for all threads, so that "
            "shards would read each other's weights: leave it out, or train with "
            "SingleDevice(shards=n)"
        )
