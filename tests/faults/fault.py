"""What the tests of faults share: how an error must surface, and what must hold afterwards."""

import re
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composefit import Strategy
from tests.lockstep.steps import data, linear, module, trainer, weights

#: Law 5: which shard, effect and step, where in the user's code, and what was done before.
NOTE = re.compile(
    r"shard \d \(lane \d, thread [\w-]+\), step \d+, batch \d+, "
    r"(before its first effect|last effect .+|at its end), in training_step \((.+):\d+\); "
    r"updates done before it: .+"
)


class Surfaced:
    """An error as a user reads it.

    Attributes:
        text: its message and its notes.
        notes: its notes.
        line: the source line of the last frame in the test's own file.
    """

    def read(self, error: BaseException, file: str) -> None:
        """Take in what was raised."""
        self.error = error
        self.notes = "\n".join(getattr(error, "__notes__", ()))
        self.text = f"{error}\n{self.notes}"
        frames = traceback.extract_tb(error.__traceback__)
        self.line = next((f.line for f in reversed(frames) if f.filename == file), "")

    def note(self, word: str) -> str:
        """The one of its notes that has this word."""
        (found,) = [note for note in self.notes.split("\n") if word in note]
        return found


@contextmanager
def surfaces(kind: type[BaseException], *words: str) -> Iterator[Surfaced]:
    """Expects exactly this kind of error with all these words, and no thread left behind."""
    threads = set(threading.enumerate())
    found = Surfaced()
    with pytest.raises(kind) as caught:
        yield found
    assert type(caught.value) is kind
    inner = caught.tb.tb_next  # the first frame is the `yield` above, the next the `with` block's
    assert inner is not None
    found.read(caught.value, inner.tb_frame.f_code.co_filename)
    for word in words:
        assert word in found.text
    assert set(threading.enumerate()) <= threads


def two() -> dict[str, nn.Module]:
    """The children of a module with two optimizers, `a` and `b`."""
    return {"a": linear(3, 1), "b": linear(3, 1, seed=1)}


def strikes(
    strategy: Callable[[], Strategy],
    step: Callable[..., Any],
    kind: type[BaseException],
    *words: str,
    line: str = "",
    done: Callable[..., Any] | None = None,
    children: dict[str, nn.Module] | None = None,
    net: Any = None,
    batch: Tensor | None = None,
) -> Surfaced:
    """Fit a module whose first step is faulty, and check all that holds after any fault.

    Args:
        strategy: makes the strategy.
        step: the faulty `training_step`.
        kind: what it raises.
        words: what message and notes must contain.
        line: the user's line at which the traceback must point; of a step that has returned there
            is none left, and the note must name its place.
        done: a step that ends where the last update was completed; none by default.
        children: of the module.
        net: the module, where no usual one will do.
        batch: its batch.
    """
    batch = data(6, 3) if batch is None else batch
    net = net or module(step, **(children or two()))
    before = weights(net)
    run = trainer(strategy())
    with surfaces(kind, *words) as found:
        run.fit(net, [batch, batch])
    note = NOTE.search(found.notes)
    assert note is not None, found.notes
    assert note[2] == step.__code__.co_filename
    if line:
        frames = traceback.extract_tb(found.error.__traceback__)
        own = [frame.line for frame in frames if frame.filename == step.__code__.co_filename]
        assert own[-1] == line
    if done is not None:
        sound = module(done, **(children or two()))
        other = trainer(strategy())
        other.step(sound, [batch])
        before = weights(sound)
        assert run.updates == other.updates
    else:
        assert not any(run.updates.values())
    assert all(map(torch.equal, weights(net), before))
    assert all(p.grad is None for p in net.parameters())
    assert run.global_step == 0
    trains_again(run, net, strategy, batch)
    return found


def trains_again(run: Any, net: Any, strategy: Callable[[], Strategy], batch: Any) -> None:
    """The same trainer trains the same module, mended, exactly as a new trainer would."""
    type(net).training_step = _sound
    state = {name: value.clone() for name, value in net.state_dict().items()}
    run.fit(net, [batch, batch])
    trained = weights(net)
    net.load_state_dict(state)
    trainer(strategy()).fit(net, [batch, batch])
    assert all(map(torch.equal, weights(net), trained))
    assert not any(map(torch.equal, trained, [state[n] for n, _ in net.named_parameters()]))


def _sound(self: Any, x: Tensor) -> Iterator[Any]:
    for name, child in self.named_children():
        yield {name: child(x).square().mean()}
