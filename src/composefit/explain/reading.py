"""From what was seen of a step to the parts of its plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from composefit.explain import traffic
from composefit.explain.keeping import added_up
from composefit.explain.memory import bytes_of
from composefit.explain.plan import Barrier, Kept, Part, Span, Taken
from composefit.explain.watching import Sight, Stretch, Total, WatchedLockstep
from composefit.lockstep.stepper import Stepper


class Extra(NamedTuple):
    """What only another run of the same step could tell of an effect.

    Attributes:
        kept: variable -> bytes, over all shards.
        held: bytes alive when all shards had arrived.
    """

    kept: dict[str, int]
    held: int | None


def extras_of(driver: WatchedLockstep) -> list[tuple[str, int, Extra]]:
    """For each effect of the step, where it stands, and what its shards keep and hold."""
    found = []
    for sights in _rounds(driver):
        kept = added_up(piece for sight in sights for piece in sight.kept)
        held = max((s.held for s in sights if s.held is not None), default=None)
        found.append((sights[0].file, sights[0].line, Extra(kept, held)))
    return found


def parts_of(driver: WatchedLockstep) -> tuple[Part, ...]:
    """The shards of the step that was run last."""
    first = driver.watched[0].batch_idx
    return tuple(
        Part(i, shard.lane, shard.batch_idx - first, shard.size)
        for i, shard in enumerate(driver.watched)
    )


def spans_of(driver: WatchedLockstep) -> tuple[Span, ...]:
    """When each worked, in the order of lanes and time."""
    start = driver.seen.start
    found = []
    for i, shard in enumerate(driver.watched):

        def span(
            kind: str,
            begin: float,
            end: float,
            stretch: Stretch,
            place: tuple[int, int] = (i, shard.lane),
        ) -> None:
            if end > begin:
                times = (begin - start) * 1e3, (end - start) * 1e3
                found.append(Span(*place, kind, *times, stretch.round))

        for stretch in shard.stretches:
            # Once gradients are taken, no code of the step runs until the next effect.
            turn = stretch.end if stretch.gradients is None else stretch.gradients
            span(stretch.kind, stretch.start, turn, stretch)
            span("backward", turn, stretch.end, stretch)
    return tuple(sorted(found, key=lambda one: (one.lane, one.start)))


def barriers_of(
    driver: WatchedLockstep, stepper: Stepper, ranks: int, sharded: bool, extras: Sequence[Extra]
) -> tuple[Barrier, ...]:
    """The effects of the step that was run last.

    Args:
        driver: ran it.
        stepper: has the optimizers.
        ranks: processes that there would be.
        sharded: whether parameters would be cut over them.
        extras: for each effect, what other runs of the step have told; may be fewer.
    """
    found = []
    seen = driver.seen
    rounds = _rounds(driver)
    arrivals = [max(ends) for ends in _times(driver, len(rounds), "end")]
    resumes = [min(starts) for starts in _times(driver, len(rounds) + 1, "start")[1:]]
    resumes += [seen.end] * (len(rounds) - len(resumes))
    answers = 0  # bytes gathered so far, whose gradients go back
    for i, sights in enumerate(rounds):
        sight = sights[0]
        taken = []
        for total in (one for one in seen.totals if one.round == i):
            times = 1 + seen.evaluations.get((total.key, i), 0)
            back = _sent(total, sight.updates, ranks, sharded, ranks * answers, times)
            taken.append(_taken(total, sight, stepper, times, back))
        extra = extras[i] if i < len(extras) else Extra({}, None)
        shared = traffic.all_gather(ranks * sum(one.shares for one in sights), ranks)
        answers += sum(one.answers for one in sights)
        found.append(
            Barrier(
                effect=sight.effect,
                label=sight.label,
                file=sight.file,
                line=sight.line,
                returned=sight.returned,
                taken=tuple(taken),
                crosses=shared + sum(one.crosses for one in taken),
                kept=tuple(Kept(name, size) for name, size in extra.kept.items()),
                held=extra.held,
                start=(arrivals[i] - seen.start) * 1e3,
                end=(resumes[i] - seen.start) * 1e3,
            )
        )
    return tuple(found)


def _rounds(driver: WatchedLockstep) -> list[list[Sight]]:
    """For each effect, how its shards yielded it."""
    columns = [
        [one.sight for one in shard.stretches if one.kind == "forward" and one.sight is not None]
        for shard in driver.watched
    ]
    return [list(sights) for sights in zip(*columns, strict=False)]


def _times(driver: WatchedLockstep, rounds: int, end: str) -> list[list[float]]:
    """For each of the first rounds that there are, when its shards began or ended."""
    columns = [
        [getattr(one, end) for one in shard.stretches if one.kind == "forward"]
        for shard in driver.watched
    ]
    longest = min(rounds, max(map(len, columns)))
    return [[column[i] for column in columns if i < len(column)] for i in range(longest)]


def _sent(total: Total, updates: bool, ranks: int, sharded: bool, answers: int, times: int) -> int:
    """Bytes that a rank sends for these gradients, taken so often."""
    if total.given:  # of what all ranks have
        sent = 0
    elif sharded:
        sent = traffic.reduce_scatter(total.bytes, ranks)
    else:
        sent = traffic.all_reduce(total.bytes, ranks)
    if not total.given:
        sent += traffic.all_reduce(answers, ranks)
    if sharded and updates:
        sent += traffic.all_gather(bytes_of(total.parameters), ranks)
    return sent * times


def _taken(total: Total, sight: Sight, stepper: Stepper, times: int, sent: int) -> Taken:
    size = bytes_of(total.parameters)
    named = stepper.optimizers[total.key] if sight.updates else None
    clipping = ""
    if named is not None and stepper.clipped is not None:
        clipping = "the module's own"
    elif named is not None and named.gradient_clip_val is not None:
        clipping = f"{named.gradient_clip_algorithm or 'norm'} {named.gradient_clip_val:g}"
    return Taken(
        name=total.key,
        kind="" if named is None else type(named.optimizer).__name__,
        parameters=len(total.parameters),
        numbers=sum(parameter.numel() for parameter in total.parameters),
        bytes=size,
        reached=total.reached,
        gradient_bytes=total.bytes,
        loss="gradients given" if total.given else sight.losses.get(total.key, ""),
        evaluations=times,
        clipping=clipping,
        crosses=sent,
    )
