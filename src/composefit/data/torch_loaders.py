"""Sources that are torch's DataLoaders: their order and their draws, with any number of workers."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sized
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    IterDataPipe,
    MapDataPipe,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
)

from composefit.data.digests import digest
from composefit.data.faults import Located, LocatedStream, WorkerStart, died, explained
from composefit.data.generators import Drawers, has_state, samplers_of
from composefit.data.indices import IndexIterator, Indices, IndicesWithState, fingerprint
from composefit.data.loaders import altered
from composefit.data.rows import Rows, Share
from composefit.data.seeding import GeneratorsKept, pass_in_words
from composefit.data.streams import OwnRows, unpack


class TorchLoader:
    """A DataLoader of any class, iterated over in a copy whose sampler brings seeds.

    What is drawn from the global generators is a function of (seed, epoch, batch), and so is the
    order, unless it comes from a generator of the sampler's or the loader's own: then it is that of
    a bare loop, and the generator's state at the epoch's start is saved. To resume, the sampler
    is replayed; of a map-style dataset nothing is loaded for that. An iterable one is replayed too,
    unless it has a state and there are no workers.

    Batches come in order, whatever `in_order` says: a position in a disorder cannot be saved.

    Of several ranks each draws the same indices, or reads the same stream, and gives `Rows`: of a
    map-style dataset a rank loads its own rows only, of an iterable one it collates only these.

    Args:
        loader: the DataLoader.
        name: what the user knows it as, for messages.
        share: this rank's; None for one process. A loader that does not batch gives each rank all.
    """

    kind = "a DataLoader"
    #: Datasets are wrapped so that errors tell which sample they are about.
    wraps = True

    def __init__(self, loader: DataLoader[Any], name: str, share: Share | None = None) -> None:
        self.loader = loader
        self.name = name
        self.share = share if loader.batch_sampler is not None else None
        self.digest = 0
        self.workers = loader.num_workers
        self.persistent = loader.persistent_workers and self.workers > 0
        self.streams = isinstance(loader.dataset, IterableDataset)
        own = _from_torch(loader)
        always = not all(map(_from_torch, (one for _, one in samplers_of(loader))))
        # A window in which the global generators may be seeded costs 20 µs: only where anybody in
        # this process may draw from them.
        quiet = own and not always and (self.workers > 0 or _draws_nothing(loader))
        self._kept = GeneratorsKept()
        self._window = nullcontext() if quiet else self._kept
        sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._indices = (IndicesWithState if has_state(sampler) else Indices)(
            sampler,
            always=always,
            in_workers=self.workers > 0,
            by_worker=self.wraps and self.streams and self.workers > 0,
            seeding=self.workers > 0 or not quiet,
            persistent=self.persistent,
            share=None if self.streams else self.share,
            workers_alike=has_state(loader),
        )
        self._arrived: deque[tuple[tuple[int, ...], int]] = deque()  # of a stream's batches
        self._drawers = Drawers(loader)
        self._clone: DataLoader[Any] | None = None
        self._iterators: list[Any] = []
        self._epoch = -1
        self._exhausted = self._failed = self._drained = self._at_end = False
        self._loaded: dict[str, Any] | None = None
        self._state: Any = None

    # -- iteration -----------------------------------------------------------------------------

    def open(self, seed: int, epoch: int, skip: int) -> Iterator[Any]:
        """See `Source`."""
        loaded = self._loaded
        if loaded is not None and loaded["epoch"] == epoch and skip and loaded["drained"]:
            return
        # A state that was loaded is then that of the end of an earlier epoch.
        earlier = self._at_end or (loaded is not None and (loaded["epoch"] != epoch or not skip))
        self._exhausted = self._failed = False
        self._arrived.clear()
        number, nothing = skip, object()
        try:
            with self._kept:
                iterator = self._start(seed, epoch, skip)
                batch = next(iterator, nothing)
                if batch is nothing and earlier:  # to which it came only now
                    iterator = self._start_anew(seed, epoch)
                    batch = next(iterator, nothing)
                self._at_end = batch is nothing and loaded is not None
            while batch is not nothing:
                self._indices.taken(number)
                if self.share is not None:
                    batch = self._rows(batch, first=number == skip)
                number += 1
                yield batch
                with self._window:
                    batch = next(iterator, nothing)
            if (error := self._indices.error) is not None:
                raise error
        except Exception as error:
            self._failed = True
            found = self._explained(error, number, epoch)
            if found is error:
                raise
            raise found from error
        self._exhausted = True

    def _start(self, seed: int, epoch: int, skip: int) -> Iterator[Any]:
        """Everything up to the first batch, from the position that was loaded, if any."""
        loaded, self._loaded = self._loaded, None
        drawers, indices = self._drawers, self._indices
        indices.before_iter = indices.after_draw = expected = None
        if loaded is not None and loaded["dataset"] is not None:
            dataset: Any = self.loader.dataset
            dataset.load_state_dict(copy.deepcopy(loaded["dataset"]))
        # Workers that stayed until then start anew now, which draws from the generators.
        stayed = False
        if loaded is not None and loaded["epoch"] == epoch:
            self._begun, self._fresh, expected = (loaded[k] for k in ("begun", "fresh", "last"))
            stayed = not self._fresh
            drawers.load_state_dict(self._begun)
        else:
            if loaded is not None:
                self._finish(loaded, seed)
                stayed = self.persistent and loaded["epoch"] >= 0
            self._begun = drawers.state_dict()
            self._fresh = not (stayed or (self.persistent and self._clone is not None))
        self._tell(epoch)
        if stayed:
            indices.before_iter = self._begin_again
        if self.workers and drawers:
            indices.after_draw = drawers.generators
        replay = self.streams and not self._saves_dataset
        if self.streams:
            indices.begin(seed, epoch, number=0 if replay else skip)
        else:
            indices.begin(seed, epoch, skip=skip, expected=expected)
        self._epoch = epoch
        if self._clone is None or not self.persistent:
            self._clone = self._copy()
        iterator = iter(self._clone)
        self.mark()
        for number in range(skip if replay else 0):
            found = next(iterator, self)
            self._arrived.clear()
            if found is self:
                raise ValueError(
                    f"{self.name} gave {number} batches of {pass_in_words(epoch)}, but {skip} were "
                    "trained on before the run was resumed: has the data changed?"
                )
        return iterator

    def _explained(self, error: Exception, number: int, epoch: int) -> Exception:
        workers = [worker for one in self._iterators for worker in one._workers]
        try:
            return explained(error, self.name, number, epoch, workers)
        except RuntimeError as other:
            # torch's handler of the signal that a worker died raises wherever it is called.
            if not died(other):
                raise
            return explained(error, self.name, number, epoch, workers)

    def _start_anew(self, seed: int, epoch: int) -> Iterator[Any]:
        self._loaded = {
            "epoch": epoch,
            "begun": self._begun,
            "fresh": self._fresh,
            "last": None,
            "dataset": None,
        }
        return self._start(seed, epoch, 0)

    def _begin_again(self) -> None:
        self._drawers.load_state_dict(self._begun)

    def _tell(self, epoch: int) -> None:
        for _, sampler in samplers_of(self.loader):
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)

    def _finish(self, loaded: dict[str, Any], seed: int) -> None:
        """Leave what samplers draw from as the loaded epoch did, which was not this one."""
        drawers, indices = self._drawers, self._indices
        if loaded["now"] is not None:
            drawers.load_state_dict(loaded["now"])
            return
        self._tell(loaded["epoch"])
        drawers.load_state_dict(loaded["begun"])
        indices.begin(seed, loaded["epoch"], expected=loaded["last"])
        iterator = IndexIterator(indices)
        if loaded["fresh"]:  # what torch does where workers start
            torch.empty((), dtype=torch.int64).random_(generator=self.loader.generator)
            iterator = IndexIterator(indices) if self.workers else iterator
        if not self.streams:
            iterator.pass_over(self._position)
            before = drawers.generators()
            if next(iterator, self) is not self:  # it was broken off there
                drawers.load_generators(before)

    def _copy(self) -> DataLoader[Any]:
        loader = self.loader
        sampler = "sampler" if loader.batch_sampler is None else "batch_sampler"
        changed: dict[str, Any] = {sampler: self._indices, "in_order": True}
        if self.workers:
            changed["worker_init_fn"] = WorkerStart(loader.worker_init_fn)
        if self.wraps and not isinstance(loader.dataset, IterDataPipe | MapDataPipe):
            changed["dataset"] = (LocatedStream if self.streams else Located)(loader.dataset)
        share = self.share if self.streams else None
        if share is not None:
            changed["collate_fn"] = OwnRows(loader.collate_fn, share)
        clone = altered(loader, **changed)
        make = clone._get_iterator

        def get_iterator() -> Any:
            made = make()
            if self.workers:
                self._iterators.append(made)
            if share is not None:
                unpack(made, self._arrived)
            return made

        clone.__dict__["_get_iterator"] = get_iterator
        return clone

    def _rows(self, batch: Any, first: bool) -> Rows:
        assert self.share is not None
        if self.streams:
            sizes, found = self._arrived.popleft()
        else:
            index = self._indices.last[0] if self._indices.last is not None else ()
            sizes = self.share.sizes(len(index))
            found = digest((index, self.loader.dataset)) if first else 0
        self.digest = found if first else self.digest
        counted = self.loader.collate_fn is default_collate
        return self.share.rows(batch, sizes, counted)

    def end(self) -> None:
        """See `Source`."""
        last = self._indices.last
        if not self._exhausted and last is not None and last[1] is not None:
            # Workers are ahead of the last batch, but the next epoch begins where it ended.
            self._drawers.load_generators(last[1])
        if self._failed or not self.persistent:
            self.close()

    def close(self) -> None:
        """See `Source`."""
        if self._clone is not None:
            self._clone.__dict__.pop("_get_iterator", None)  # which refers to it
            self._clone._iterator = None
        self._clone = None
        self._stop_workers()

    def _stop_workers(self) -> None:
        iterators, self._iterators = self._iterators, []
        for iterator in iterators:
            try:
                iterator._shutdown_workers()
            except RuntimeError as error:  # of a signal handler, at any time: it is told already
                if not died(error):
                    raise
            for queue in iterator._index_queues:
                if (thread := getattr(queue, "_thread", None)) is not None:
                    thread.join(1)  # has nothing left to do

    # -- state ---------------------------------------------------------------------------------

    @property
    def per_rank(self) -> bool:
        """See `Source`. A map-style dataset knows of what this rank has loaded only."""
        return self.share is not None and not self.streams and has_state(self.loader.dataset)

    @property
    def _saves_dataset(self) -> bool:
        return not self.workers and has_state(self.loader.dataset)

    def mark(self) -> None:
        """See `Source`."""
        self._marked = self._indices.last
        self._dataset = self._dataset_state()
        dataset = None if self._clone is None else self._clone.dataset
        self._drained = self._saves_dataset and getattr(dataset, "drained", False)

    def _dataset_state(self) -> Any:
        dataset: Any = self.loader.dataset
        return copy.deepcopy(dataset.state_dict()) if self._saves_dataset else None

    def state_dict(self, ended: bool) -> dict[str, Any]:
        """See `Source`."""
        kept_by_workers = self.persistent or not self.streams
        if self.workers and kept_by_workers and has_state(self.loader.dataset):
            raise ValueError(
                f"the dataset of {self.name} has a state, which is in its workers, where this "
                "DataLoader cannot get at it: use torchdata's StatefulDataLoader, or num_workers=0"
            )
        if self._loaded is not None:
            return self._loaded
        state = {
            "epoch": self._epoch,
            "now": self._drawers.state_dict() if ended else None,
            "dataset": self._dataset_state() if ended else self._dataset,
            "drained": self._drained,
            **self._shape(),
        }
        if self._epoch >= 0:
            state["begun"], state["fresh"] = self._begun, self._fresh
            state["last"] = None if self._marked is None else fingerprint(self._marked[0])
        return state

    def load_state_dict(self, state: dict[str, Any], position: int) -> None:
        """See `Source`."""
        words = {"length": "{} samples in its dataset", "workers": "{} workers"}
        for name, here in self._shape().items():
            if state[name] != here:
                raise ValueError(
                    f"{self.name} has {words[name].format(here)}, but the state was saved with "
                    f"{words[name].format(state[name])}: it is resumed with the same data only"
                )
        self.close()
        self._loaded, self._position = state, position
        self._epoch = state["epoch"]

    def _shape(self) -> dict[str, Any]:
        """What must be the same when a state is loaded."""
        dataset = self.loader.dataset
        try:
            length = len(dataset) if isinstance(dataset, Sized) else None
        except TypeError:
            length = None
        return {"length": length, "workers": self.workers if self.streams else None}


class StatefulTorchLoader(TorchLoader):
    """A DataLoader with a state of its own, such as torchdata's StatefulDataLoader.

    Its state is taken at every mark. Seeds travel with its sampler's indices.
    """

    kind = "a DataLoader with a state of its own"
    wraps = False

    def _start(self, seed: int, epoch: int, skip: int) -> Iterator[Any]:
        loaded, self._loaded = self._loaded, None
        indices = self._indices
        if self._clone is None:
            self._clone = self._copy()
        clone: Any = self._clone
        if loaded is not None:
            if loaded["loader"] is None:
                self._drawers.load_state_dict(loaded["now"])
            else:
                clone.load_state_dict(copy.deepcopy(loaded["loader"]))
            if loaded["epoch"] not in (epoch, -1) and not loaded["exhausted"]:
                # It was broken off there: an iterator takes up the state, the next begins anew.
                self._tell(loaded["epoch"])
                indices.begin(seed, loaded["epoch"])
                iter(clone)
                if not self.persistent:
                    self._stop_workers()
        self._tell(epoch)
        indices.begin(seed, epoch)
        self._epoch = epoch
        iterator: Iterator[Any] = iter(clone)
        self.mark()
        return iterator

    def _start_anew(self, seed: int, epoch: int) -> Iterator[Any]:
        return self._start(seed, epoch, 0)

    def end(self) -> None:
        """See `Source`."""
        if self._failed or not self.persistent:
            self._stop_workers()
        if self._failed and self._clone is not None:
            self._clone._iterator = None

    def mark(self) -> None:
        """See `Source`."""
        clone: Any = self._clone
        if clone is not None and clone._iterator is not None:
            self._state = copy.deepcopy(clone.state_dict())

    def state_dict(self, ended: bool) -> dict[str, Any]:
        """See `Source`."""
        if self._loaded is not None:
            return self._loaded
        if ended:
            self.mark()
        return {
            "epoch": self._epoch,
            "drained": False,
            "exhausted": self._exhausted and ended,
            "loader": self._state,
            "now": self._drawers.state_dict() if self._state is None else None,
            **self._shape(),
        }


def _from_torch(thing: object) -> bool:
    """Samplers of torch draw from the global generators at first only, its loaders never."""
    of_torch = type(thing).__module__.partition(".")[0] in ("torch", "torchdata")
    return of_torch or type(thing) in (list, tuple, range)


def _draws_nothing(loader: DataLoader[Any]) -> bool:
    """Whether loading a batch surely does not draw from any global generator."""
    datasets: list[Any] = [loader.dataset]
    while datasets:
        dataset = datasets.pop()
        if type(dataset) is Subset:
            datasets.append(dataset.dataset)
        elif type(dataset) is ConcatDataset:
            datasets.extend(dataset.datasets)
        elif type(dataset) not in (TensorDataset, list, tuple, range):
            return False
    return loader.collate_fn in (default_collate, default_convert)
