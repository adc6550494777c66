"""What `Trainer(strategy=...)` may be: a strategy, or its name."""

from __future__ import annotations

from composefit.strategies.base import Strategy
from composefit.strategies.single_device import SingleDevice
from composefit.strategies.thread_data_parallel import ThreadDataParallel

_NAMES: dict[str, type[SingleDevice | ThreadDataParallel]] = {
    "auto": SingleDevice,
    "single": SingleDevice,
    "threads": ThreadDataParallel,
}


def choose(strategy: object) -> Strategy:
    """The strategy that a user asked for.

    Args:
        strategy: a strategy, or `"auto"` (one device), `"single"`, `"threads"`.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
        TypeError: neither a name nor a strategy.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if not isinstance(strategy, str):
        hint = ""
        if isinstance(strategy, type) and issubclass(strategy, Strategy):
            hint = f": write {strategy.__name__}() with parentheses"
        raise TypeError(f"strategy must be a Strategy or a name, got {strategy!r}{hint}")
    if strategy not in _NAMES:
        raise ValueError(
            f"unknown strategy {strategy!r}: choose one of {', '.join(map(repr, _NAMES))}, or pass "
            "a Strategy such as ThreadDataParallel(threads=4)"
        )
    return _NAMES[strategy]()
