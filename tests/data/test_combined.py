"""Several loaders as one: what each mode gives, anew in each pass, and resumed anywhere."""

import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from composefit.data import Batches, CombinedLoader, LoaderBatches, LoaderList, PerRank, Rows
from composefit.data.loaders import in_order, one_after_another, one_shot
from tests.data.grid import (
    Augmented,
    Loaded,
    Reiterable,
    Stream,
    batches_of,
    drawn,
    generator,
    loader,
    reloaded,
    scramble,
    train,
)
from tests.data.world import Agreement, close, resumed, steps, world

# torchdata 0.11 as it is made.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

MODES = ["min_size", "max_size_cycle", "max_size", "sequential"]
every_mode = pytest.mark.parametrize("mode", MODES)

#: Two batches, three, and five, as lists of numbers.
A, B, C = [1, 2], [10, 20, 30], [100, 200, 300, 400, 500]


def both(loaders: Any, mode: str) -> list[Any]:
    """What an epoch gives: iterated over by hand, and in a run."""
    combined = CombinedLoader(loaders, mode)
    by_hand = list(combined)
    assert list(Batches(combined, "train").epoch()) == by_hand
    assert len(combined) == len(by_hand)
    return by_hand


# -- what comes ---------------------------------------------------------------------------------


def test_min_size_ends_with_the_shortest() -> None:
    assert both({"a": A, "b": B}, "min_size") == [{"a": 1, "b": 10}, {"a": 2, "b": 20}]


def test_max_size_gives_none_for_a_loader_at_its_end() -> None:
    assert both({"a": A, "b": B}, "max_size") == [
        {"a": 1, "b": 10},
        {"a": 2, "b": 20},
        {"a": None, "b": 30},
    ]


def test_max_size_cycle_begins_shorter_ones_anew_until_the_longest_ends() -> None:
    expected = [
        {"a": a, "b": b, "c": c}
        for a, b, c in zip(itertools.cycle(A), itertools.cycle(B), C, strict=False)
    ]
    assert both({"a": A, "b": B, "c": C}, "max_size_cycle") == expected


def test_sequential_gives_one_loaders_batches_after_anothers() -> None:
    assert both({"a": A, "b": B}, "sequential") == [*A, *B]


def test_loaders_may_be_in_lists_and_nested() -> None:
    assert both([A, B], "min_size") == [[1, 10], [2, 20]]
    assert both((A, B), "max_size") == [[1, 10], [2, 20], [None, 30]]
    loaders = {"x": [DataLoader(A), DataLoader(B)], "y": DataLoader(C)}
    *_, last = CombinedLoader(loaders, "max_size")
    assert last == {"x": [None, None], "y": 500}
    assert type(last) is LoaderBatches
    assert type(last["x"]) is LoaderList
    # As Lightning does: all are one round, each comes around by itself.
    cycled = [x for (_, x), _ in (batch.values() for batch in CombinedLoader(loaders, MODES[1]))]
    assert torch.cat(cycled).tolist() == [10, 20, 30, 10, 20]
    nested = {"x": CombinedLoader({"a": A, "b": B}), "y": C}
    assert both(nested, "max_size")[1:3] == [
        {"x": {"a": 2, "b": 20}, "y": 200},
        {"x": None, "y": 300},
    ]


@every_mode
def test_a_single_loader_is_itself(mode: str) -> None:
    assert [int(x) for x in both(DataLoader(A), mode)] == A


def test_a_list_within_is_a_loader_of_batches_unless_it_is_made_of_loaders() -> None:
    batches = [torch.zeros(2), torch.ones(2)]
    (first, _) = CombinedLoader({"a": batches, "b": DataLoader(A)})
    assert torch.equal(first["a"], batches[0])
    (first, _) = CombinedLoader({"a": [DataLoader(A), PerRank(B)]})
    assert first == {"a": [1, 10]}


def test_a_round_starts_no_pass_that_it_does_not_need() -> None:
    class Counted:
        passes = 0

        def __iter__(self) -> Iterator[int]:
            self.passes += 1
            return iter(A)

    a, b = Counted(), Counted()
    assert len(list(CombinedLoader({"a": a, "b": b}, "max_size_cycle"))) == 2
    assert (a.passes, b.passes) == (1, 1)


def test_lengths_are_those_of_an_epoch_where_they_are_known() -> None:
    def endless() -> Any:
        return DataLoader(Unsized(), batch_size=None)

    sizes = {"min_size": 2, "max_size_cycle": 3, "max_size": 3, "sequential": 5}
    for mode, size in sizes.items():
        assert len(CombinedLoader([A, B], mode)) == size
        assert Batches(CombinedLoader([A, B], mode), "train").number == size
        unknown = CombinedLoader([A, endless()], mode)
        if mode == "min_size":
            assert len(unknown) == 2
        else:
            assert Batches(unknown, "train").number == math.inf
            with pytest.raises(TypeError, match="not every one of these loaders says how many"):
                len(unknown)
    with pytest.raises(TypeError, match="none of these loaders says"):
        len(CombinedLoader([endless(), endless()]))


class Unsized(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(A)


@pytest.mark.parametrize(("limit", "number"), [(2, 2), (0.5, 2), (9, 5), (1.0, 5)])
def test_a_limit_counts_what_comes(limit: float, number: int) -> None:
    batches = Batches(CombinedLoader([A, C], "max_size_cycle"), "train", limit)
    assert batches.number == len(list(batches.epoch())) == number


def test_what_is_no_loader_is_told_where() -> None:
    with pytest.raises(ValueError, match=r"mode=\.\.\.\) is one of 'min_size', .*, got 'longest'"):
        CombinedLoader([A], "longest")
    with pytest.raises(ValueError, match=r"at least one loader, got {}"):
        CombinedLoader({})
    with pytest.raises(TypeError, match=r"the loader .a\['b'\]. must be an iterable .* got int"):
        CombinedLoader({"a": {"b": 3}})
    with pytest.raises(ValueError, match=r"two loaders have one name: a\[0\], a\[0\]"):
        CombinedLoader({"a": [DataLoader(A)], "a[0]": A})
    with pytest.raises(TypeError, match="got CombinedLoader; in a dict of loaders write it around"):
        PerRank(CombinedLoader([A]))
    with pytest.raises(TypeError, match=r"train is a list of loaders.*or CombinedLoader\(\["):
        Batches([CombinedLoader([A]), B], "train")


def test_what_can_be_iterated_once_is_not_begun_anew() -> None:
    combined = CombinedLoader({"a": iter(A), "b": B}, "max_size_cycle")
    assert one_shot(combined) is not None
    batches = Batches(combined, "train")
    with pytest.raises(ValueError, match=r"loader 'a' is to begin anew .* iterated only once"):
        list(batches.epoch())
    with pytest.raises(ValueError, match=r"loader 'a' is to begin anew"):
        list(CombinedLoader({"a": [], "b": B}, "max_size_cycle"))


def test_what_is_evaluated_one_after_another() -> None:
    loaders = [DataLoader(A), DataLoader(B)]
    assert one_after_another(CombinedLoader(loaders, "sequential")) == loaders
    assert one_after_another({"a": A, "b": B}) == [A, B]
    assert one_after_another(loaders) == loaders
    for one in (CombinedLoader(loaders), A, DataLoader(A), [torch.zeros(2)]):
        assert one_after_another(one) == [one]


def test_a_combined_loader_travels_to_another_process() -> None:
    combined = pickle.loads(pickle.dumps(CombinedLoader({"a": A, "b": B}, "max_size")))
    assert list(combined) == list(CombinedLoader({"a": A, "b": B}, "max_size"))


def test_in_order_no_pass_shuffles() -> None:
    shuffled = [DataLoader(A, shuffle=True), DataLoader(C, shuffle=True)]
    found = list(in_order(CombinedLoader(shuffled, "max_size_cycle")))
    assert [[int(x) for x in batch] for batch in found] == [
        [a, c] for a, c in zip(itertools.cycle(A), C, strict=False)
    ]


def test_the_caller_ends_what_was_left_running() -> None:
    left = []

    class Open:
        def __init__(self, name: str, size: int) -> None:
            self.name, self.size = name, size

        def __iter__(self) -> Iterator[int]:
            try:
                yield from range(self.size)
            finally:
                left.append(self.name)

    batches = Batches(CombinedLoader([Open("a", 1), Open("b", 3)], "max_size"), "train")
    iterator = batches.epoch()
    assert [next(iterator) for _ in range(2)] == [[0, 0], [None, 1]]
    assert left == ["a"]
    iterator.close()  # type: ignore[attr-defined]
    assert left == ["a", "b"]


# -- passes -------------------------------------------------------------------------------------


class Numbers(Dataset[Tensor]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor(float(i))

    def __len__(self) -> int:
        return self.size


@pytest.mark.parametrize("workers", [0, 2])
def test_each_pass_holds_every_sample_once_in_an_order_of_its_own(workers: int) -> None:
    def make() -> Any:
        short = DataLoader(Numbers(8), 4, shuffle=True, num_workers=workers)
        return CombinedLoader({"a": short, "b": DataLoader(Numbers(20), 4)}, "max_size_cycle")

    orders = []
    batches = batches_of(make())
    for epoch in range(2):
        rows = torch.cat([batch["a"] for batch in batches.epoch(epoch)])
        orders += [rows[:8].tolist(), rows[8:16].tolist()]
        assert sorted(orders[-1]) == sorted(orders[-2]) == [*range(8)]
    assert len({tuple(order) for order in orders}) == 4
    again = batches_of(make())
    found = torch.cat([batch["a"] for batch in again.epoch(0)])
    assert found[:16].tolist() == [*orders[0], *orders[1]]
    batches.close()
    again.close()


def test_a_samplers_generator_goes_on_through_the_passes_as_in_a_bare_loop() -> None:
    def make() -> DataLoader[Tensor]:
        return DataLoader(Numbers(6), 3, shuffle=True, generator=generator())

    combined = CombinedLoader({"a": make(), "b": [*range(6)]}, "max_size_cycle")
    found = [batch["a"].tolist() for batch in Batches(combined, "train").epoch()]
    bare = make()
    assert found == [x.tolist() for _ in range(3) for x in bare]


def test_an_error_in_a_later_pass_says_which() -> None:
    class Breaks(Numbers):
        loaded = 0

        def __getitem__(self, i: int) -> Tensor:
            self.loaded += 1
            if self.loaded == 4:
                raise OSError("gone")
            return super().__getitem__(i)

    combined = CombinedLoader({"a": DataLoader(Breaks(3)), "b": C}, "max_size_cycle")
    with pytest.raises(OSError, match="gone") as caught:
        list(Batches(combined, "train").epoch())
    assert any("for batch 0 of pass 1 of epoch 0" in note for note in caught.value.__notes__)


# -- law 3 --------------------------------------------------------------------------------------

#: How to make the shorter of two loaders, of three batches; the other one has six or seven.
SHORT: dict[str, Callable[[int], Any]] = {
    "shuffle": lambda w: loader(Augmented(), w, shuffle=True, batch_size=8),
    "own generator": lambda w: loader(
        Augmented(), w, shuffle=True, batch_size=8, generator=generator()
    ),
    "persistent": lambda w: loader(
        Augmented(), w, shuffle=True, batch_size=8, persistent_workers=w > 0
    ),
    "iterable": lambda w: loader(Stream(), w, batch_size=10),
    "StatefulDataLoader": lambda w: loader(
        Augmented(), w, StatefulDataLoader, shuffle=True, batch_size=8
    ),
}
PLAIN: dict[str, Callable[[int], Any]] = {
    "list": lambda _: [torch.full((2,), float(i)) for i in range(3)],
    "iterable that draws": lambda _: Three(),
    "loader with state": lambda _: LoadedThree(),
    "nested": lambda _: CombinedLoader(
        [loader(Augmented(), 0, shuffle=True, batch_size=8), [torch.zeros(1)]], "max_size_cycle"
    ),
}


class Three(Reiterable):
    def __iter__(self) -> Iterator[Tensor]:
        return itertools.islice(super().__iter__(), 3)


class LoadedThree(Loaded):
    def __iter__(self) -> Iterator[Tensor]:
        while self.position < 3:
            self.position += 1
            yield drawn(self.position)
        self.position = 0


def equal(a: Any, b: Any) -> bool:
    """Bitwise."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a is None and b is None


CASES = [
    *((name, make, workers) for name, make in SHORT.items() for workers in (0, 2)),
    *((name, make, 0) for name, make in PLAIN.items()),
]


@every_mode
@pytest.mark.parametrize(
    ("name", "make", "workers"), CASES, ids=[f"{name}-{workers}" for name, _, workers in CASES]
)
def test_stopped_anywhere_and_resumed_all_batches_are_those_of_a_run_never_stopped(
    mode: str, name: str, make: Callable[[int], Any], workers: int
) -> None:
    def combined() -> CombinedLoader:
        long = loader(Augmented(), 0, shuffle=True, generator=generator())
        return CombinedLoader({"short": make(workers), "long": long}, mode)

    torch.manual_seed(3)
    batches = batches_of(combined())
    expected = [train(batches, 0), [], []]
    states = []  # of each: how many batches of epoch 1 were trained on, and where it goes on
    for batch in batches.epoch(1):
        states.append((len(expected[1]), 1, reloaded(batches.state_dict())))
        expected[1].append(batch)
        batches.mark()
    number = len(expected[1])
    last = reloaded(batches.state_dict())
    states += [(number, 1, last), (number, 2, last)]
    expected[2] = train(batches, 2)
    batches.close()
    if workers:  # starting them takes time
        states = [states[i] for i in (0, number // 2, number - 1, -1)]
    for done, first, state in states:
        scramble()
        batches = batches_of(combined(), seed=0)
        batches.load_state_dict(state)
        for epoch in range(first, 3):
            whole = expected[epoch][done:] if epoch == 1 else expected[epoch]
            assert equal(train(batches, epoch), whole), (done, first, epoch)
        batches.close()


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size"])
def test_a_resumed_run_loads_no_sample_that_it_skips(mode: str) -> None:
    def combined(short: Augmented, long: Augmented) -> CombinedLoader:
        a = loader(short, 0, shuffle=True, batch_size=8)
        return CombinedLoader({"a": a, "b": loader(long, 0, shuffle=True)}, mode)

    batches = batches_of(combined(Augmented(), Augmented()))
    train(batches, 0, 4)
    short, long = Augmented(), Augmented()
    again = batches_of(combined(short, long), seed=0)
    again.load_state_dict(reloaded(batches.state_dict()))
    rest = train(again, 0)
    assert len(rest) == 2
    assert len(long.loaded) == 4 + 2
    assert len(short.loaded) == (8 + 6 if mode == "max_size_cycle" else 0)


def test_a_state_is_for_the_same_mode_and_the_same_loaders() -> None:
    state = batches_of(CombinedLoader({"a": A, "b": A})).state_dict()
    with pytest.raises(ValueError, match=r"combined by 'max_size', but .* by 'min_size'"):
        batches_of(CombinedLoader({"a": A, "b": A}, "max_size")).load_state_dict(state)
    with pytest.raises(ValueError, match=r"loaders are a, c, but those of the state are a, b"):
        batches_of(CombinedLoader({"a": A, "c": A})).load_state_dict(state)


# -- ranks --------------------------------------------------------------------------------------


def pair(mode: str) -> CombinedLoader:
    short = loader(Numbers(10), 0, shuffle=True)
    return CombinedLoader({"a": short, "b": loader(Numbers(22), 0, shuffle=True)}, mode)


@every_mode
def test_ranks_get_their_rows_of_what_one_process_gets(mode: str) -> None:
    alone = train(batches_of(pair(mode)), 0)
    ranks = world(lambda: pair(mode), 2)
    several = steps(ranks)
    assert len(several) == len(alone)
    for given, batch in zip(several, alone, strict=True):
        assert all(type(rows) is Rows for rows in given)
        if mode == "sequential":
            assert torch.equal(torch.cat([rows.batch for rows in given]), batch)
            continue
        for key in "ab":
            parts = [rows.batch[key] for rows in given]
            if batch[key] is None:
                assert parts == [None, None]
            else:
                assert torch.equal(torch.cat(parts), batch[key])
        sizes = given[0].sizes
        assert sizes is not None
        assert sum(sizes) == len(next(one for one in batch.values() if one is not None))
    assert ranks[0].fingerprint() == ranks[1].fingerprint() != 0
    close(ranks)


@every_mode
def test_ranks_are_resumed_and_in_another_number_too(mode: str) -> None:
    ranks = world(lambda: pair(mode), 2)
    whole = steps(ranks)
    close(ranks)
    for done in range(1, len(whole)):
        ranks = world(lambda: pair(mode), 2)
        steps(ranks, number=done)
        state = ranks[0].state_dict()
        close(ranks)
        rest = steps(resumed(lambda: pair(mode), 2, state))
        assert len(rest) == len(whole) - done
        for given, before in zip(rest, whole[done:], strict=True):
            assert all(equal(a.batch, b.batch) for a, b in zip(given, before, strict=True))
        (one,) = resumed(lambda: pair(mode), 1, state)
        assert len(train(one, 0)) == len(whole) - done


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size"])
def test_a_loader_per_rank_ends_on_all_ranks_with_the_first_that_has_none(mode: str) -> None:
    made = itertools.cycle([[torch.zeros(2)] * 2, [torch.ones(2)] * 3])

    class Agree(Agreement):
        """Asks whether any rank has none left, pass after pass."""

        def of(self, rank: int) -> Callable[[bool], bool]:
            def agree(ended: bool) -> bool:
                self.asked[rank] += 1
                return self.asked[rank] % 3 == 0

            return agree

    def make() -> CombinedLoader:
        return CombinedLoader({"a": [torch.arange(4)] * 5, "own": PerRank(next(made))}, mode)

    ranks = world(make, 2, agreement=Agree([2, 3]))
    for rank, rows in enumerate(zip(*steps(ranks), strict=True)):
        # A batch that nobody has divided yet is whole.
        found = [(row.batch if isinstance(row, Rows) else row)["own"] for row in rows]
        assert [one is None for one in found] == [mode == "max_size" and i > 1 for i in range(5)]
        assert all(torch.equal(one, torch.full((2,), float(rank))) for one in found[:2])
