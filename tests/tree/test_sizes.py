import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from composefit.tree import even_sizes, shard_sizes


def possible_parts(groups: int, parts: int) -> Iterator[tuple[int, ...]]:
    for ends in itertools.combinations(range(1, groups), parts - 1):
        yield tuple(end - start for start, end in itertools.pairwise((0, *ends, groups)))


@pytest.mark.parametrize("group", [1, 2, 3])
def test_even_sizes_are_the_evenest_there_are(group: int) -> None:
    for samples, parts in itertools.product(range(1, 14), range(1, 6)):
        sizes = even_sizes(samples, parts, group)
        assert sum(sizes) == samples
        assert len(sizes) == max(1, min(parts, samples // group))
        assert all(end % group == 0 for end in itertools.accumulate(sizes[:-1]))
        assert min(sizes) >= min(group, samples)
        whole = [size // group for size in sizes]
        assert whole == sorted(whole, reverse=True)
        if samples >= group:
            spread = min(max(p) - min(p) for p in possible_parts(samples // group, len(sizes)))
            assert max(whole) - min(whole) == spread


def test_seven_samples_on_four_lanes_leave_no_shard_of_one_if_pairs_stay_together() -> None:
    assert even_sizes(7, 4) == [2, 2, 2, 1]
    assert even_sizes(7, 4, group=2) == [2, 2, 3]
    assert even_sizes(0, 4) == []


def test_shard_sizes_hold_what_they_promise() -> None:
    for samples, lanes, microbatch, group in itertools.product(
        range(0, 20), range(1, 5), range(1, 8), range(1, 4)
    ):
        if microbatch < group:
            continue
        shards = shard_sizes(samples, lanes, microbatch, group)
        assert [sum(lane) for lane in shards] == even_sizes(samples, lanes, group)
        flat = [size for lane in shards for size in lane]
        assert all(1 <= size <= microbatch for size in flat)
        assert all(end % group == 0 for end in itertools.accumulate(flat[:-1]))
        for lane in shards:
            # No more micro-batches than needed: whole groups, then room for what is left over.
            most, (groups, rest) = microbatch // group, divmod(sum(lane), group)
            if groups == 0:
                assert lane == [rest]
                continue
            fewest = -(-groups // most)
            room = any(
                parts[-1] * group + rest <= microbatch and max(parts) <= most
                for parts in possible_parts(groups, fewest)
            )
            assert len(lane) == fewest + (not room)
            if group + rest <= microbatch:
                assert lane[-1] >= group


def test_shard_sizes_without_a_microbatch_are_one_per_lane() -> None:
    assert shard_sizes(7, 3, None) == [[3], [2], [2]]
    assert shard_sizes(2, 4, None) == [[1], [1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: even_sizes(-1, 1), "samples of at least 0, got -1"),
        (lambda: even_sizes(1, 0), "parts of at least 1, got 0"),
        (lambda: even_sizes(1, 1, 0), "group of at least 1, got 0"),
        (lambda: shard_sizes(1, 1, 0), "microbatch of at least 1, got 0"),
        (lambda: shard_sizes(4, 1, 1, 2), "one group of 2 samples, got 1; raise microbatch_size"),
    ],
)
def test_impossible_sizes_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
