"""A change to torch that several users share: the first makes it, the last takes it back."""

import contextlib
import threading
from collections.abc import Callable, Iterator


class Installation:
    """Counts the users of a process-wide change.

    Args:
        install: makes the change.
        uninstall: takes it back.
    """

    def __init__(self, install: Callable[[], None], uninstall: Callable[[], None]) -> None:
        self._install = install
        self._uninstall = uninstall
        self._lock = threading.Lock()
        self.users = 0

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """The change is there inside the `with` block, which may be open often, in any thread."""
        with self._lock:
            if not self.users:
                self._install()
            self.users += 1
        try:
            yield
        finally:
            with self._lock:
                self.users -= 1
                if not self.users:
                    self._uninstall()
