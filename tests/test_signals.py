import faulthandler
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data._utils import signal_handling

from composefit.signals import Signals, leave_signals_to_parent

SOURCES = Path(__file__).parents[1] / "src"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGUSR1")

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
CODES = {TERM: 143, USR1: 128 + USR1}


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    """Started in the background, a process ignores Ctrl-C, and Python leaves it at that."""
    before = {INT: signal.signal(INT, signal.default_int_handler)}
    for signum in (TERM, USR1):
        before[signum] = signal.signal(signum, signal.SIG_DFL)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def in_place() -> list[Any]:
    return [signal.getsignal(signum) for signum in (INT, TERM, USR1)]


def to_main(signum: int) -> None:
    """As from outside: the system picks the main thread, whatever that waits for."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signum)


# -- noted and obeyed ------------------------------------------------------------------------------


def test_a_signal_waits_until_it_is_obeyed() -> None:
    with pytest.raises(KeyboardInterrupt), Signals() as signals:
        signals.obey()
        assert signals.received == 0
        signal.raise_signal(INT)
        assert signals.received == INT
        signals.obey()
    assert signals.received == 0


@pytest.mark.parametrize("signum", [TERM, USR1])
def test_signals_of_a_cluster_exit_with_the_code_of_a_killed_process(signum: int) -> None:
    with pytest.raises(SystemExit) as raised, Signals() as signals:
        signal.raise_signal(signum)
        assert signals.received == signum
        signals.obey()
    assert raised.value.code == CODES[signal.Signals(signum)]


def test_a_second_ctrl_c_is_immediate() -> None:
    with Signals() as signals:
        signal.raise_signal(INT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(INT)
        assert signals.received == 0


def test_a_second_ctrl_c_is_immediate_also_after_the_first_was_obeyed() -> None:
    saved = []
    with Signals() as signals:
        signal.raise_signal(INT)
        with pytest.raises(KeyboardInterrupt) as first:
            signals.obey()
        with pytest.raises(KeyboardInterrupt) as second:
            signal.raise_signal(INT)
            saved.append("all")
    assert not saved and first.value is not second.value


def test_the_next_run_is_polite_again() -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), Signals() as signals:
            signal.raise_signal(INT)
            signals.obey()


@pytest.mark.parametrize("signum", [TERM, USR1])
def test_a_second_signal_of_a_cluster_is_as_polite_as_the_first(signum: int) -> None:
    with pytest.raises(SystemExit), Signals() as signals:
        for _ in range(3):
            signal.raise_signal(signum)
        assert signals.received == signum


@pytest.mark.parametrize("order", [(INT, TERM), (TERM, INT)])
def test_what_ends_the_process_comes_before_what_a_notebook_catches(order: tuple[int, int]) -> None:
    with pytest.raises(SystemExit) as raised, Signals() as signals:
        for signum in order:
            signal.raise_signal(signum)
        signals.obey()
    assert raised.value.code == 143


# -- the end of a run ------------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "kind"), [(INT, KeyboardInterrupt), (TERM, SystemExit)])
def test_a_signal_after_the_last_look_is_not_lost(signum: int, kind: type[BaseException]) -> None:
    with pytest.raises(kind), Signals():
        signal.raise_signal(signum)


def test_a_signal_beside_an_error_is_a_note_of_it() -> None:
    with pytest.raises(ValueError, match="mine") as raised, Signals():
        signal.raise_signal(TERM)
        raise ValueError("mine")
    assert raised.value.__notes__ == ["SIGTERM came as well; this came first"]


def test_a_sigterm_after_ctrl_c_still_ends_the_process() -> None:
    with pytest.raises(SystemExit), Signals() as signals:
        signal.raise_signal(INT)
        try:
            signals.obey()
        finally:
            signal.raise_signal(TERM)


def test_a_run_without_a_signal_ends_as_it_does() -> None:
    with Signals():
        pass
    with pytest.raises(ValueError, match="mine") as raised, Signals():
        raise ValueError("mine")
    assert not hasattr(raised.value, "__notes__")


# -- whose handlers --------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_handlers_are_put_back(fails: bool) -> None:
    before = in_place()
    try:
        with Signals():
            assert all(now != then for now, then in zip(in_place(), before, strict=True))
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert in_place() == before == [signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL]


@pytest.mark.parametrize("signum", [INT, TERM, USR1])
@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda signum, frame: None, signal.SIG_DFL])
def test_a_handler_that_somebody_has_set_stays(signum: int, handler: Any) -> None:
    if handler == signal.SIG_DFL and signum != INT:
        return  # Python's own
    signal.signal(signum, handler)
    with Signals() as signals:
        assert signal.getsignal(signum) is handler
        if handler != signal.SIG_DFL:
            signal.raise_signal(signum)
            assert signals.received == 0
    assert signal.getsignal(signum) is handler


def test_a_handler_set_in_c_stays(tmp_path: Path) -> None:
    with open(tmp_path / "traces", "w+") as file:
        faulthandler.register(USR1, file=file, all_threads=False)
        try:
            with Signals() as signals:
                signal.raise_signal(USR1)
                assert signals.received == 0
            signal.raise_signal(USR1)
        finally:
            faulthandler.unregister(USR1)
        file.seek(0)
        assert file.read().count("most recent call first") == 2


def test_a_handler_that_is_set_during_the_run_stays_after_it() -> None:
    mine: Callable[..., None] = lambda signum, frame: None  # noqa: E731
    with Signals():
        signal.signal(TERM, mine)
    assert signal.getsignal(TERM) is mine
    assert signal.getsignal(USR1) == signal.SIG_DFL


def test_in_another_thread_nothing_is_taken_over() -> None:
    found: list[Any] = []

    def run() -> None:
        with Signals() as signals:
            found.extend([in_place(), signals.received])
            signals.obey()

    before = in_place()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before, 0]


# -- runs within runs ------------------------------------------------------------------------------


def test_the_innermost_run_obeys() -> None:
    before = in_place()
    with Signals() as outer:
        with pytest.raises(KeyboardInterrupt), Signals() as inner:
            signal.raise_signal(INT)
            assert (outer.received, inner.received) == (0, INT)
            inner.obey()
        assert outer.received == 0
    assert in_place() == before


@pytest.mark.parametrize("fails", [False, True])
def test_what_an_inner_run_does_not_get_to_is_handed_on(fails: bool) -> None:
    with pytest.raises(SystemExit), Signals() as outer:
        try:
            with Signals():
                signal.raise_signal(TERM)
                if fails:
                    raise ValueError
        except ValueError as error:
            assert not hasattr(error, "__notes__")
        assert outer.received == TERM
        with Signals() as second:  # nor does the next one run as if nothing had been
            assert (outer.received, second.received) == (0, TERM)


def test_a_second_ctrl_c_is_immediate_in_and_around_an_inner_run() -> None:
    with Signals() as outer:
        signal.raise_signal(INT)
        with Signals() as inner:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(INT)
            assert inner.received == outer.received == 0
    with Signals() as outer:
        with Signals():
            signal.raise_signal(INT)
        assert outer.received == INT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(INT)


# -- waits -----------------------------------------------------------------------------------------


def test_a_wait_goes_on_after_a_signal() -> None:
    items: queue.Queue[str] = queue.Queue()
    with pytest.raises(SystemExit), Signals() as signals:

        def elsewhere() -> None:
            to_main(TERM)
            while not signals.received:
                time.sleep(0.001)
            items.put("came")

        thread = threading.Thread(target=elsewhere)
        thread.start()
        assert items.get(timeout=60) == "came"
        thread.join()


def test_a_second_ctrl_c_ends_a_wait() -> None:
    with Signals() as signals:

        def elsewhere() -> None:
            to_main(INT)
            while not signals.received:
                time.sleep(0.001)
            to_main(INT)

        thread = threading.Thread(target=elsewhere)
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            queue.Queue().get(timeout=60)
        thread.join()


# -- children --------------------------------------------------------------------------------------

# Programs of their own: forks of a process with threads, as the tests' is, are warned of.


def start(tmp_path: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    file = tmp_path / "program.py"
    file.write_text("import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n")
    with file.open("a") as text:
        text.write(program)
    return subprocess.Popen(
        [sys.executable, str(file), *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, which it shares with its workers
    )


CHILDREN = """
import multiprocessing, os, time
from torch.utils.data._utils import signal_handling

from composefit.signals import Signals

def sleep(ready):
    try:
        ready.set()
        time.sleep(60)
    except KeyboardInterrupt:
        os._exit(77)

def end(signum, daemon):
    ready = context.Event()
    child = context.Process(target=sleep, args=(ready,), daemon=daemon)
    child.start()
    ready.wait()
    os.kill(child.pid, signum)
    child.join(0.5 if daemon and signum != signal.SIGTERM else 60)
    code = child.exitcode
    child.kill()
    child.join()
    return code

context = multiprocessing.get_context("fork")
with Signals() as signals:
    for daemon in (False, True):
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            print(daemon, signal.Signals(signum).name, end(signum, daemon))
    assert signals.received == 0
"""


def test_forked_children_die_as_without_us_but_daemonic_ones_leave_ctrl_c_to_us(
    tmp_path: Path,
) -> None:
    out, err = start(tmp_path, CHILDREN).communicate(timeout=120)
    assert err == ""
    assert out.splitlines() == [
        "False SIGINT 77",
        f"False SIGTERM {-TERM}",
        f"False SIGUSR1 {-USR1}",
        "True SIGINT None",
        f"True SIGTERM {-TERM}",
        "True SIGUSR1 None",
    ]


WORKERS = """
import sys, time, torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from composefit.signals import Signals, leave_signals_to_parent

class Data(Dataset):
    def __len__(self):
        return 100
    def __getitem__(self, index):
        time.sleep(0.01)
        return torch.tensor(index)

def init(worker):
    leave_signals_to_parent()

def main(method, dies):
    with Signals() as signals:
        loader = DataLoader(Data(), num_workers=2, multiprocessing_context=method,
                            worker_init_fn=init if method == "spawn" else None)
        batches = iter(loader)
        for number, batch in enumerate(batches):
            if number == 3:
                print("in a step", flush=True)
                while not signals.received:
                    time.sleep(0.001)
                # Meanwhile the workers do what they do about it.
                deadline = time.monotonic() + (30 if dies else 0.5)
                while time.monotonic() < deadline:
                    alive = [worker.is_alive() for worker in batches._workers]
                    if dies and not any(alive):
                        break
                    time.sleep(0.001)
                print("step done", alive, flush=True)
                if not dies:
                    print("batch", next(batches).item(), flush=True)
                try:
                    signals.obey()
                finally:
                    print("saved", flush=True)

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "dies")
"""


@pytest.mark.parametrize(
    ("method", "signum"), [("fork", INT), ("fork", TERM), ("fork", USR1), ("spawn", INT)]
)
def test_a_signal_to_the_whole_group_lets_the_step_end(
    tmp_path: Path, method: str, signum: int
) -> None:
    workers = "die" + "s" * (signum == TERM)
    process = start(tmp_path, WORKERS, method, workers)
    assert process.stdout is not None
    assert process.stdout.readline() == "in a step\n"
    os.killpg(process.pid, signum)
    out, err = process.communicate(timeout=120)
    if signum == TERM:
        assert out.splitlines() == ["step done [False, False]", "saved"]
    else:
        assert out.splitlines() == ["step done [True, True]", "batch 4", "saved"]
    if signum == INT:
        assert process.returncode == -INT  # the one traceback is the main process's
        assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt")
    else:
        assert process.returncode == CODES[signal.Signals(signum)] and err == ""


def test_torch_is_told_of_dead_workers_again_after_the_run() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    torchs = next_torch_handler()
    try:
        with pytest.raises(SystemExit), Signals() as signals:
            signal.signal(signal.SIGCHLD, torchs)
            signal.raise_signal(TERM)
            assert signal.getsignal(signal.SIGCHLD) is not torchs
            signals.obey()
        assert signal.getsignal(signal.SIGCHLD) is torchs
    finally:
        signal.signal(signal.SIGCHLD, before)


def next_torch_handler() -> Callable[..., None]:
    """The handler that a DataLoader with workers sets, once in a process."""
    before, signal_handling._SIGCHLD_handler_set = signal_handling._SIGCHLD_handler_set, False
    now = signal.getsignal(signal.SIGCHLD)
    try:
        signal_handling._set_SIGCHLD_handler()
        handler = signal.getsignal(signal.SIGCHLD)
    finally:
        signal_handling._SIGCHLD_handler_set = before
        signal.signal(signal.SIGCHLD, now)
    assert callable(handler)
    return handler


def test_somebody_elses_look_at_children_goes_on() -> None:
    mine: Callable[..., None] = lambda signum, frame: None  # noqa: E731
    before = signal.signal(signal.SIGCHLD, mine)
    try:
        with pytest.raises(SystemExit), Signals():
            signal.raise_signal(TERM)
            assert signal.getsignal(signal.SIGCHLD) is mine
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_worker_leaves_ctrl_c_to_its_parent_and_still_dies_of_sigterm() -> None:
    leave_signals_to_parent()
    signal.raise_signal(INT)
    signal.raise_signal(USR1)
    assert signal.getsignal(TERM) == signal.SIG_DFL


def test_a_worker_keeps_handlers_of_its_own() -> None:
    signal.signal(INT, signal.SIG_IGN)
    leave_signals_to_parent()
    assert signal.getsignal(INT) == signal.SIG_IGN
