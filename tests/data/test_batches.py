"""What a loader is, how many batches it gives, and what several give together."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from composefit.data import Batches, CombinedLoader, LoaderBatches
from tests.data.grid import BATCHES, Loaded, same


class Stream(IterableDataset[int]):
    """Does not say how long it is."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class Fetched:
    """Counts what was fetched of it."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.fetched = 0

    def __iter__(self) -> Iterator[int]:
        for i in range(self.length):
            self.fetched += 1
            yield i


def test_an_epoch_is_one_pass_and_can_be_repeated() -> None:
    batches = Batches([1, 2, 3], "train", epochs=2)
    assert batches.number == 3
    assert list(batches.epoch()) == list(batches.epoch()) == [1, 2, 3]


@pytest.mark.parametrize(
    ("limit", "number"),
    [(None, 5), (2, 2), (9, 5), (1, 1), (1.0, 5), (0.5, 2), (0.1, 1), (0.99, 4)],
)
def test_limits_are_numbers_or_fractions(limit: Any, number: int) -> None:
    batches = Batches([*range(5)], "train", limit)
    assert batches.number == number
    assert list(batches.epoch()) == [*range(number)]


def test_nothing_is_fetched_beyond_the_limit() -> None:
    loader = Fetched(5)
    assert list(Batches(loader, "train", 2).epoch()) == [0, 1]
    assert loader.fetched == 2


def test_unknown_lengths_are_infinite_and_take_whole_numbers_only() -> None:
    stream = DataLoader(Stream(), batch_size=None)
    assert Batches(stream, "train").number == math.inf
    assert list(Batches(stream, "train").epoch()) == [*range(5)]
    assert list(Batches(stream, "train", 1.0).epoch()) == [*range(5)]
    assert list(Batches(stream, "train", 3).epoch()) == [*range(3)]
    with pytest.raises(ValueError, match=r"train does not say how many .* whole number of batches"):
        Batches(stream, "train", 0.5)


def test_a_length_that_is_too_small_cuts_nothing_off() -> None:
    class Estimated(list[int]):
        def __len__(self) -> int:
            return 2

    batches = Batches(Estimated([1, 2, 3]), "train")
    assert batches.number == 2
    assert list(batches.epoch()) == [1, 2, 3]


def test_a_list_of_loaders_is_refused_before_its_loaders_are_taken_for_batches() -> None:
    loaders = [DataLoader([1, 2]), DataLoader([3])]
    with pytest.raises(TypeError, match=r"val is a list of loaders.*\{\"name\": loader"):
        Batches(loaders, "val")


def test_one_shot_iterators_are_for_one_epoch() -> None:
    assert list(Batches(iter([1, 2]), "train", epochs=1).epoch()) == [1, 2]
    for endless in (itertools.count(), (i for i in itertools.count())):
        with pytest.raises(ValueError, match="train is a one-shot iterator"):
            Batches(endless, "train", epochs=2)
    with pytest.raises(ValueError, match="one-shot"):
        Batches({"a": [1], "b": {"c": iter([1])}}, "train", epochs=math.inf)


def test_several_loaders_give_a_dict_and_end_with_the_shortest() -> None:
    batches = Batches({"labelled": [1, 2, 3], "unlabelled": Fetched(2)}, "train", epochs=2)
    assert batches.number == 3  # of those that say it
    for _ in range(2):
        found = list(batches.epoch())
        assert found == [{"labelled": i + 1, "unlabelled": i} for i in range(2)]
        assert all(type(batch) is LoaderBatches for batch in found)


def test_several_loaders_know_their_length_where_one_does() -> None:
    stream = DataLoader(Stream(), batch_size=None)
    assert len(CombinedLoader({"a": [1, 2, 3], "b": [1, 2]})) == 2
    assert len(CombinedLoader({"a": stream, "b": [1, 2]})) == 2
    assert Batches({"a": stream, "b": Fetched(2)}, "train").number == math.inf
    with pytest.raises(ValueError, match="at least one"):
        Batches({}, "train")


def test_a_loader_with_a_state_that_a_limit_stops_at_its_end_begins_anew() -> None:
    limited = Batches(Loaded(), "train", BATCHES, epochs=2)
    free = Batches(Loaded(), "train", epochs=2)
    for _ in range(2):
        assert same(list(limited.epoch()), list(free.epoch()))
