"""Errors of loaders: which sample, worker, batch and epoch they are about."""

import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from composefit.data.seeding import pass_in_words
from composefit.signals import leave_signals_to_parent

_SAMPLE = re.compile(r"^while sample (.+) was loaded$", re.MULTILINE)
_WORKER = re.compile(r"in DataLoader worker process (\d+)")
_DIED = re.compile(r"^DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)")
_HANGS = re.compile(r"^DataLoader timed out after (\S+) seconds")


class Located(Dataset[Any]):
    """A map-style dataset whose errors say which sample they are about."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            _locate(error, index)
            raise

    def __getitems__(self, indices: Any) -> list[Any]:
        index: Any = None
        try:
            if getitems := getattr(self.dataset, "__getitems__", None):
                found: list[Any] = getitems(indices)
                return found
            dataset, loaded = self.dataset, []
            for index in indices:
                loaded.append(dataset[index])
            return loaded
        except Exception as error:
            if index is None:  # who knows which
                first = next(iter(indices), None)
                index = "of none" if first is None else f"{first}, or another one of its batch,"
            _locate(error, index)
            raise

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return _attribute(self, name)


class LocatedStream(IterableDataset[Any]):
    """An iterable dataset whose errors say which sample they are about.

    Its iterator is made when the first sample is asked for, under that batch's seeds: workers that
    stay from epoch to epoch make it while their generators are in a state that nobody knows.

    Attributes:
        drained: there is no sample left.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.drained = False

    def __iter__(self) -> Iterator[Any]:
        number = 0
        self.drained = False
        try:
            for sample in self.dataset:
                yield sample
                number += 1
        except Exception as error:
            _locate(error, f"{number} of the stream")
            raise
        self.drained = True

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return _attribute(self, name)


class WorkerStart:
    """A `worker_init_fn` that calls the user's, and shows it and all others the user's dataset.

    Args:
        function: the user's, or None.
    """

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, worker_id: int) -> None:
        """Called in each worker as it starts."""
        leave_signals_to_parent()  # a worker that is not forked has Python's own handlers
        info: Any = get_worker_info()
        if isinstance(info.dataset, Located | LocatedStream):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # it refuses the plain way
        if self.function is not None:
            self.function(worker_id)


def explained(error: Exception, name: str, batch: int, epoch: int, workers: list[Any]) -> Exception:
    """The error to raise for one that a loader raised.

    Args:
        error: what it raised.
        name: the loader's.
        batch: the number of the batch that it was asked for, from 0.
        epoch: the epoch's number, from 0.
        workers: its processes.

    Returns:
        The same error with a note; or where workers died or hang, a RuntimeError that names them.
    """
    where = f"batch {batch} of {pass_in_words(epoch)}"
    kept = "Nothing that was trained on is lost, and the last checkpoint holds: resume from it"
    # What a dead worker had sent may be gone, too: that is an EOFError, a ConnectionError, ...
    if died(error) or (isinstance(error, EOFError | OSError) and not _WORKER.search(str(error))):
        for worker in workers:
            with suppress(RuntimeError):  # torch's handler tells of a death wherever it comes
                worker.join(0.1)  # for its exit code
        dead = ", ".join(_death(w) for w in workers if w.exitcode)
        if dead or died(error):
            return RuntimeError(f"a worker of {name} died before {where}: {dead or error}. {kept}")
    if isinstance(error, RuntimeError) and (hangs := _HANGS.search(str(error))):
        pids = ", ".join(f"{i}: pid {worker.pid}" for i, worker in enumerate(workers))
        return RuntimeError(
            f"{name} gave no {where} within its timeout of {hangs[1]} seconds: a worker hangs, or "
            f"is too slow for the timeout. Its workers are {pids} (see what they do with "
            f"`py-spy dump --pid ...`). {kept}"
        )
    text = "\n".join((str(error), *getattr(error, "__notes__", ())))
    sample, worker = _SAMPLE.search(text), _WORKER.search(str(error))
    error.add_note(
        f"while {name} loaded "
        + (f"sample {sample[1]} for " if sample else "")
        + where
        + (f" in worker {worker[1]}" if worker else "")
    )
    return error


def died(error: Exception) -> bool:
    """Whether it is torch's error for a worker that died."""
    return isinstance(error, RuntimeError) and _DIED.search(str(error)) is not None


def _death(worker: Any) -> str:
    if worker.exitcode > 0:
        return f"pid {worker.pid} exited with code {worker.exitcode}"
    hint = " (which is how Linux ends what takes too much memory)" if worker.exitcode == -9 else ""
    name = signal.Signals(-worker.exitcode).name
    return f"pid {worker.pid} was killed by signal {-worker.exitcode} ({name}){hint}"


def _locate(error: Exception, index: Any) -> None:
    if not isinstance(error, StopIteration):
        error.add_note(f"while sample {index} was loaded")
        return
    found = RuntimeError("the dataset raised StopIteration, which would have ended the epoch")
    _locate(found, index)
    raise found from error


def _attribute(wrapper: Any, name: str) -> Any:
    if name == "dataset" or name.startswith("__"):  # while it is copied or unpickled
        raise AttributeError(name)
    return getattr(wrapper.dataset, name)
