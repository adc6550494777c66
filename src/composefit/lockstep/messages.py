"""What the driver says of a step that went wrong: errors, a warning, and notes on errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress

from torch import nn
from torch.nn import Parameter

from composefit.lockstep.shard import Shard
from composefit.optimizers import NamedOptimizer

# -- errors ------------------------------------------------------------------------------------


def disagreement(shards: Sequence[Shard]) -> RuntimeError:
    """Shards stand at different effects: what each one did, and where."""
    lines = []
    for shard in shards:
        did = "ended"
        if shard.effect is not None:
            did = f"{'returned' if shard.done else 'yielded'} {shard.effect!r}"
        lines.append(f"  shard {shard.index} ({shard.where()}): {did}")
    return RuntimeError(
        "the shards of this step disagree; all must yield the same effects, with the same "
        "names and shapes, in the same order:\n" + "\n".join(lines) + "\nA condition that "
        "steers the step must be the same in every shard: reduce what it depends on "
        "(`value = yield Mean(total, weight)`), or draw it from self.random.shared"
    )


def refuse_disagreement(shards: Sequence[Shard]) -> None:
    """Raise where shards stand at different effects."""
    first = shards[0].effect
    agreement = None if first is None else first.agreement()
    for shard in shards:
        effect = shard.effect
        if (None if effect is None else effect.agreement()) != agreement:
            raise disagreement(shards)


def global_draw() -> RuntimeError:
    """Shards side by side drew from a generator that has one state for all threads."""
    return RuntimeError(
        "the step drew from Python's `random` or NumPy's global generator while several "
        "shards ran side by side: these have one state for all threads, so that no run "
        "would repeat another. Use self.random.uniform(n, ...), a draw per sample, or "
        "self.random.shared, the same for all shards"
    )


def differing_writes(name: str, reason: str) -> RuntimeError:
    """Shards wrote different values into a buffer, and `reason` says why they do not merge."""
    return RuntimeError(
        f"the shards have written different values into buffer {name!r} ({reason}): which "
        "one counts would be chance. Write it at a barrier instead, "
        "`yield from Once(self.method, tensors)`, which hands the method the rows of all "
        "shards; or, if it is a running mean, name it in the module's class attribute "
        "running_statistics"
    )


def no_path(name: str, step: str) -> RuntimeError:
    """A loss without a gradient for any parameter of its optimizer."""
    return RuntimeError(
        f"the loss of {name!r} reaches none of its optimizer's parameters: was it detached, or "
        f"computed under torch.no_grad(), from other networks than the optimizer's, or are all of "
        f"them frozen (requires_grad=False)? Compute it in {step} from what the optimizer updates"
    )


# -- a warning ---------------------------------------------------------------------------------


def warn_of_foreign_mean(what: str, shards: Sequence[Shard]) -> None:
    """Warn at the user's yield of a loss that is a mean over something else than samples."""
    code, line = shards[0].place()
    warnings.warn_explicit(
        f"a loss is a mean over {what}, not over samples: with {len(shards)} shards the "
        "step's loss is then not the batch's, since each shard divides by a number of its own. "
        "Write Mean.of(loss, weight), with the shard's weight of all targets that count, such "
        "as (target != ignore_index).sum() or class_weights[target].sum()",
        UserWarning,
        code.co_filename if code is not None else "<unknown>",
        line or (code.co_firstlineno if code is not None else 0),
    )


def written_parameter(owner: nn.Module, parameter: Parameter) -> RuntimeError:
    """The error for a parameter that the step itself has written into, in each of its shards."""
    names = {id(p): name for name, p in owner.named_parameters()}
    return RuntimeError(
        f"the step has written into parameter {names[id(parameter)]!r} in each of its shards, "
        "which share it: it would be changed as often as there are shards. Write it where code "
        "runs once: in on_after_optimizer_step (averaged weights, clamping), or in a method called "
        "by `yield from Once(self.method)`"
    )


# -- notes -------------------------------------------------------------------------------------


def shard_note(shard: Shard, step: int, updates: dict[str, int]) -> str:
    """The note on an error: where it happened and what was done before."""
    if shard.effect is not None:
        effect = f"last effect {shard.effect!r}"
    else:
        effect = "at its end" if shard.done else "before its first effect"
    done = ", ".join(f"{name}: {n}" for name, n in updates.items()) or "none"
    ranks = shard.lock.ranks
    rank = "" if ranks is None else f"rank {ranks.world.rank}, "
    return (
        f"{rank}shard {shard.index} (lane {shard.lane}, thread {shard.thread}), step {step}, "
        f"batch {shard.batch_idx}, {effect}, in {shard.lock.body.name} ({shard.where()}); "
        f"updates done before it: {done}"
    )


def raised_as_well(
    error: BaseException, others: Sequence[tuple[Shard, BaseException]]
) -> Iterator[str]:
    """Notes on what other shards raised beside an error, shards that raised the same in one."""
    by_text: dict[str, list[int]] = {}
    for shard, other in others:
        by_text.setdefault(repr(other), []).append(shard.index)
    for text, indices in by_text.items():
        names = " and ".join(map(str, indices))
        what = "the same" if text == repr(error) else f"{text} as well"
        yield f"shard{'s' * (len(indices) > 1)} {names} raised {what}"


def note(error: BaseException, text: str) -> None:
    """Add a note, where the exception takes one: a frozen one must still come out as itself."""
    with suppress(Exception):
        error.add_note(text)


def loss_must_be_a_function(name: str, one: NamedOptimizer) -> TypeError:
    """The error for an optimizer that asks for its loss, and got a number."""
    kind = type(one.optimizer).__name__
    return TypeError(
        f"optimizer {name!r} is {kind}, whose step(closure) evaluates the loss several times, and "
        f"the step yielded one that is evaluated already: yield a function, {{{name!r}: lambda: "
        "loss_of(...)}, which computes it from the batch each time"
    )
