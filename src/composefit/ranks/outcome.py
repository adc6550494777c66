"""`Outcome`: how a rank's function has ended, as it is told to the process that has launched it."""

from __future__ import annotations

import io
import pickle
import time
import traceback
from dataclasses import dataclass
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from composefit.ranks.world import PeerFailed

__all__ = ["Outcome"]


@dataclass
class Outcome:
    """How a rank's function has ended.

    Attributes:
        rank: whose it is.
        when: on the clock of this machine (`time.monotonic`), in seconds.
        kind: of the error: `"own"`, `"peer's"` (it failed because another rank did), `"exit"` (it
            asked to end the process), or None for none.
        error: the exception, where it can be pickled.
        text: its type and message.
        traceback: as Python prints it.
    """

    rank: int
    when: float
    kind: str | None = None
    error: bytes | None = None
    text: str = ""
    traceback: str = ""

    @classmethod
    def of_error(cls, rank: int, error: BaseException) -> Outcome:
        """That of a rank whose function has raised."""
        kind = "own" if isinstance(error, Exception) else "exit"
        return cls(
            rank,
            time.monotonic(),
            kind="peer's" if isinstance(error, PeerFailed) else kind,
            error=_pickled(error),
            text="".join(traceback.format_exception_only(error)).strip(),
            traceback="".join(traceback.format_exception(error)),
        )

    def raised(self) -> BaseException:
        """The error as it was, its traceback there as the cause."""
        error: BaseException
        try:
            error = pickle.loads(self.error) if self.error else RuntimeError(self.text)
        except Exception:  # of a class that is not here
            error = RuntimeError(self.text)
        error.__cause__ = Elsewhere(f"in rank {self.rank}:\n\n{self.traceback.rstrip()}\n")
        return error


class Elsewhere(Exception):
    """The traceback of an error in another process, as its cause here."""

    def __str__(self) -> str:
        return str(self.args[0])


def _pickled(error: BaseException) -> bytes | None:
    """An exception as bytes that give one of the same type; None if that cannot be."""
    for candidate in (error, _Remade(error)):
        try:
            data: bytes = cloudpickle.dumps(candidate)
            if type(pickle.load(io.BytesIO(data))) is type(error):
                return data
        except Exception:
            continue
    return None


class _Remade:
    """Pickles an exception whose `__init__` does not take what the exception has as `args`."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> Any:
        return _remake, (type(self._error), self._error.args, vars(self._error))


def _remake(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(state)
    return error
