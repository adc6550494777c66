"""`Batches`: what loops iterate over, epoch after epoch, from where a checkpoint left off."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from composefit.data.generators import has_state
from composefit.data.loaders import (
    CombinedLoader,
    PerRank,
    as_loader,
    in_order,
    number_of_batches,
    one_shot,
    refuse_divided,
)
from composefit.data.per_rank import OwnBatches
from composefit.data.rows import Share
from composefit.data.several import Several
from composefit.data.sources import Items, Iterated, OwnState, Source, digest_of, same_kind
from composefit.data.torch_loaders import StatefulTorchLoader, TorchLoader


class Batches:
    """A loader's batches, epoch after epoch, guarding the fetching and only that.

    A `StopIteration` ends the epoch only here, never when the user's step raises it.

    The order of the samples and what is drawn while they are loaded (from the global generators of
    torch, NumPy and `random`) are a function of `seed`, the epoch and the batch: the same with any
    number of workers, and the same when an epoch is resumed in its middle. The process's own
    global generators are as before after each fetch. By kind of loader, batches that were trained
    on are passed over

    - in a DataLoader over a map-style dataset by replaying its sampler, loading nothing; a
      generator that the user gave to the loader or a sampler goes on from its state at the epoch's
      start, and so does a sampler with `state_dict` and `load_state_dict`;
    - in a DataLoader over an iterable dataset by loading them again, or if the dataset has
      `state_dict` and `load_state_dict` and there are no workers, by its state;
    - in torchdata's StatefulDataLoader, and any loader that has them, by the loader's state;
    - in a list by the position, in any other iterable by iteration.

    A batch is that of all ranks together, and the same with any number of them. Where there are
    several, a DataLoader that batches gives each rank `Rows` of it, contiguous and in rank order:
    over a map-style dataset a rank loads its own samples only; a stream every rank reads, and
    collates its own. Other loaders give every rank the whole batch, to be cut by who trains on it.
    In a `PerRank` a loader gives each rank batches of its own.

    Args:
        loader: an iterable of batches, such as a DataLoader, or a dict of such.
        name: what the user knows it as, for messages.
        limit: no more than this many batches an epoch, or as a float this fraction of them.
        epochs: how many times it will be iterated over.
        sequential: take the samples of a shuffling DataLoader in their order instead, so that a
            limit means the same batches in every epoch. A random or weighted sampler gives way to
            a sequential one, that of a random subset to the subset in its order, and any other
            sampler or loader stays as it is.
        ranks: this process's rank, and how many there are. Ranks of one run have the same seed.
        group: samples that stay together on a rank.
        dim: the dimension of a batch's tensors that counts samples, where batches are cut here: in
            a dict of loaders of which only some give rows.
        agree: tells whether any rank has a batch, given whether this one has; called by all ranks
            before each batch of a `PerRank` loader, and for no other.

    Raises:
        TypeError: it is no loader.
        ValueError: a fraction of a number that nobody knows; a one-shot iterator for several
            epochs; a sampler that divides the samples over the ranks; `PerRank` among several
            ranks without `agree`.

    Attributes:
        number: batches an epoch; infinity where the loader does not say.
        seed: of all that is drawn; to be set before the first epoch.
        position: batches of this epoch that have been trained on, as of the last mark.

    Example:
        >>> batches = Batches([10, 11, 12], "train")
        >>> for batch in batches.epoch(0):
        ...     batches.mark()  # it has been trained on
        ...     if batch == 11:
        ...         break
        >>> resumed = Batches([10, 11, 12], "train")
        >>> resumed.load_state_dict(batches.state_dict())
        >>> list(resumed.epoch(0))
        [12]
    """

    def __init__(
        self,
        loader: object,
        name: str,
        limit: int | float | None = None,
        epochs: float = 1,
        sequential: bool = False,
        ranks: tuple[int, int] = (0, 1),
        group: int = 1,
        dim: int = 0,
        agree: Callable[[bool], bool] | None = None,
    ) -> None:
        self.loader = as_loader(loader, name)
        self.name = name
        self.ranks = ranks
        self.available = number_of_batches(self.loader, ranks[1])
        self.number = _limited(self.available, name, limit)
        # Without a limit the loader's end counts: what it says of its length may be an estimate.
        no_limit = limit is None or self.number == math.inf
        self._limit = None if no_limit else int(self.number)
        if epochs > 1 and (once := one_shot(self.loader)) is not None:
            raise ValueError(
                f"{name} is a one-shot iterator ({type(once).__name__}), not "
                "re-iterable: it would be empty from the second epoch on. Pass something that can "
                "be iterated again, such as a DataLoader or a list"
            )
        self.seed = 0
        self.position = 0
        used = in_order(self.loader) if sequential else self.loader
        share = Share(*ranks, group, dim) if ranks[1] > 1 else None
        self._source = _source(used, name) if share is None else _shared(used, name, share, agree)
        self._digest = 0
        self._epoch = -1
        self._first = 0
        self._fetched = 0
        self._over = True
        self._loaded = False
        self._waits_for_ranks = False

    def epoch(self, number: int | None = None) -> Iterator[Any]:
        """The batches of one epoch; of the one that was loaded, those that are left.

        Args:
            number: the epoch's, from 0; without it, the one after the last.

        Raises:
            ValueError: no batch at all: in the first epoch an empty loader, later one that cannot
                be iterated twice. A state was loaded that does not go with what the sampler gives,
                or only the part of it that all ranks share.
            RuntimeError: a worker died or hangs.
        """
        if self._waits_for_ranks:
            raise ValueError(
                f"{self.name} gives each rank batches of its own, but the states of the ranks were "
                "not loaded: call load_rank_states with them after load_state_dict"
            )
        number = self._epoch + 1 if number is None else number
        skip = 0
        if self._loaded and number == self._epoch:
            if self._over:
                return
            skip = self.position
        else:
            self._first = number if self._epoch < 0 else self._first
        self._loaded = False
        self._epoch, self.position, self._fetched, self._over = number, skip, skip, False
        self._digest = 0
        batches = self._source.open(self.seed, number, skip)
        left = None if self._limit is None else max(0, self._limit - skip)
        try:
            for batch in islice(batches, left):
                if self._fetched == skip and self.ranks[1] > 1:
                    self._digest = digest_of(self._source, batch)
                self._fetched += 1
                yield batch
            self._over = True
        finally:
            if isinstance(batches, Generator):
                batches.close()
            self._source.end()
        if self._fetched:
            return
        if number > self._first:
            raise ValueError(
                f"{self.name} gave no batch in its epoch {number + 1}: it is not re-iterable. "
                "Pass something that can be iterated again, such as a DataLoader or a list"
            )
        raise ValueError(
            f"{self.name} gave no batch at all: is the dataset empty, or smaller than one batch "
            "with drop_last=True?"
        )

    def fingerprint(self) -> float:
        """A number that ranks must agree on in each epoch, once its first batch was given.

        If they do not, they read different samples where they ought to divide the same ones.

        Returns:
            A whole number below 2**32, of the samples in the world's batch; of a map-style dataset,
            of their indices. 0 before the first batch, with one rank, and of `PerRank`.
        """
        return float(self._digest)

    def mark(self) -> None:
        """All batches given so far have been trained on: a state from now on resumes here."""
        self.position = self._fetched
        self._source.mark()

    def close(self) -> None:
        """End the workers, also those that stay from epoch to epoch."""
        self._source.close()

    def state_dict(self) -> dict[str, Any]:
        """The position as of the last mark, and all that is needed to go on from there.

        It is the same on all ranks, and loads into any number of them, but for what `rank_state`
        gives.

        Raises:
            ValueError: a part of the state is in workers that nobody can ask.
        """
        per_rank = self._per_rank
        return {
            "kind": self._source.kind,
            "batches": None if self.available == math.inf else self.available,
            "seed": self.seed,
            "epoch": self._epoch,
            "position": self.position,
            "over": self._done,
            "ranks": self.ranks[1] if per_rank else None,
            "source": None if per_rank else self._source.state_dict(self._done),
        }

    @property
    def _done(self) -> bool:
        return self._over and self.position == self._fetched

    @property
    def _per_rank(self) -> bool:
        return self.ranks[1] > 1 and self._source.per_rank

    def rank_state(self) -> dict[str, Any] | None:
        """What belongs to this rank alone, as of the last mark; None where nothing does.

        That is: the state of a `PerRank` loader, and that of a map-style dataset with
        `state_dict`. All loaders of a dict go with the one that has it.
        """
        return self._source.state_dict(self._done) if self._per_rank else None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state: `epoch` of its epoch gives what is left.

        Raises:
            ValueError: it was saved with another kind of loader, another number of batches, or
                another number of samples; or by another number of ranks, each with a part of it.
        """
        saved = state.get("ranks") or 1
        if saved != (self.ranks[1] if self._per_rank else 1):
            raise ValueError(_other_ranks(self.name, saved, self.ranks[1]))
        same_kind(self.name, self._source, state["kind"])
        available = None if self.available == math.inf else self.available
        if state["batches"] != available:
            raise ValueError(
                f"{self.name} has {_said(available)} an epoch, but the state was saved with "
                f"{_said(state['batches'])}: a run is resumed with the same data and batch size"
            )
        if state["source"] is not None:
            self._source.load_state_dict(state["source"], state["position"])
        self._waits_for_ranks = state["source"] is None
        self.seed = state["seed"]
        self._epoch = state["epoch"]
        self.position = self._fetched = state["position"]
        self._over = state["over"]
        self._loaded = True

    def load_rank_states(self, states: Sequence[dict[str, Any] | None]) -> None:
        """After `load_state_dict`: what `rank_state` gave on each rank, in rank order.

        Raises:
            ValueError: they are those of another number of ranks, or of other loaders.
        """
        if not self._per_rank:
            return
        own = states[self.ranks[0]] if len(states) == self.ranks[1] else None
        if own is None:
            raise ValueError(_other_ranks(self.name, len(states), self.ranks[1]))
        self._source.load_state_dict(own, self.position)
        self._waits_for_ranks = False


def _shared(
    loader: Iterable[Any],
    name: str,
    share: Share,
    agree: Callable[[bool], bool] | None,
    together: bool = False,
) -> Source:
    """As `_source`, of what one of several ranks gets."""
    if isinstance(loader, PerRank):
        if agree is None:
            raise ValueError(
                f"{name} is a PerRank loader, for which the ranks must agree before each batch: "
                "give Batches a function agree"
            )
        return OwnBatches(_source(loader.loader, name), name, share, agree, together)
    if isinstance(loader, CombinedLoader):
        # Groups are those of the first, as where a batch is cut into shards.
        others = replace(share, group=1)
        shares = {key: others if i else share for i, key in enumerate(loader.loaders)}
        sources = {
            key: _shared(one, _inside(name, key), shares[key], agree, together=True)
            for key, one in loader.loaders.items()
        }
        return Several(loader, sources, shares)
    if isinstance(loader, DataLoader):
        refuse_divided(loader, name)
        return (StatefulTorchLoader if has_state(loader) else TorchLoader)(loader, name, share)
    return _source(loader, name)


def _source(loader: Iterable[Any], name: str) -> Source:
    if isinstance(loader, PerRank):
        return _source(loader.loader, name)
    if isinstance(loader, CombinedLoader):
        sources = {key: _source(one, _inside(name, key)) for key, one in loader.loaders.items()}
        return Several(loader, sources)
    if isinstance(loader, DataLoader):
        return (StatefulTorchLoader if has_state(loader) else TorchLoader)(loader, name)
    if has_state(loader):
        return OwnState(loader)
    if type(loader) in (list, tuple, range):
        return Items(loader)  # type: ignore[arg-type]
    return Iterated(loader)


def _inside(name: str, key: str) -> str:
    """What one of several loaders is called: `train['a']`, `train['a'][0]`, `train[0]`."""
    first, bracket, rest = key.partition("[")
    return f"{name}[{first!r}]{bracket}{rest}" if first else f"{name}{key}"


def _limited(available: float, name: str, limit: int | float | None) -> float:
    if limit is None or isinstance(limit, int):
        return available if limit is None else min(limit, available)
    if limit == 1.0:
        return available
    if available == math.inf:
        raise ValueError(
            f"{name} does not say how many batches it has, so {limit} of them is no number: give "
            "a whole number of batches"
        )
    return min(available, max(1, int(available * limit)))


def _other_ranks(name: str, saved: int, here: int) -> str:
    return (
        f"{name} gives each rank batches of its own, or its dataset has a state on each, which "
        f"was saved by {saved} {'ranks' if saved > 1 else 'rank'}, but there "
        f"{'are' if here > 1 else 'is'} {here} now. Resume with the same number of processes and "
        "the same loaders; or load the weights alone, and begin the epoch anew"
    )


def _said(batches: float | None) -> str:
    return "an unknown number of batches" if batches is None else f"{batches} batches"
