"""F46: memory runs out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from composefit import SingleDevice, Strategy, checkpoint
from tests.faults import runs
from tests.faults.conftest import Tells
from tests.faults.fault import strikes, surfaces
from tests.faults.table import message
from tests.lockstep.steps import data, every_strategy, linear, module, trainer

Make = Callable[[], Strategy]

TOO_MUCH = 2**50  # numbers: more than any machine can address
REFUSED = "can't allocate memory"


@every_strategy
def test_f46_out_of_memory(strategy: Make, tells: Tells) -> None:
    def before(self: Any, x: Tensor) -> Any:
        torch.empty(TOO_MUCH)
        yield {"a": self.a(x).mean()}

    def between(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).mean()}
        torch.empty(TOO_MUCH)
        yield {"b": self.b(x).mean()}

    def once(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).mean()}

    shards = "1 shard of 6" if strategy().lanes == 1 else "3 shards of 2"
    halved = 3 if strategy().lanes == 1 else 1
    words = (
        f"memory ran out in a step of 6 samples in {shards} (microbatch_size=None)",
        f"write Trainer(microbatch_size={halved}), which makes the same update",
    )
    line = "torch.empty(TOO_MUCH)"
    found = strikes(strategy, before, RuntimeError, REFUSED, *words, line=line)
    if strategy().lanes > 1:
        tells("the error itself, with the note", message(found.note("memory ran out")))
    strikes(strategy, between, RuntimeError, REFUSED, *words, line=line, done=once)


@pytest.mark.parametrize(
    ("samples", "microbatch", "words"),
    [
        (7, 4, ("7 samples in 2 shards of 3 to 4 (microbatch_size=4)", "microbatch_size=2)")),
        (3, 1, ("in 3 shards of 1 (", "cannot hold less than one sample", "bf16-mixed")),
    ],
)
def test_f46_the_note_says_how_the_batch_was_cut(
    samples: int, microbatch: int, words: tuple[str, ...]
) -> None:
    def step(self: Any, x: Tensor) -> Any:
        torch.empty(TOO_MUCH)

    with surfaces(RuntimeError, REFUSED, *words):
        trainer(microbatch_size=microbatch).step(module(step), [data(samples, 3)])


def test_f46_the_note_does_without_sizes_that_nobody_knows() -> None:
    def step(self: Any, batch: Any) -> Any:
        torch.empty(TOO_MUCH)

    with surfaces(RuntimeError, REFUSED, "in a step of 1 shard (", "microbatch_size=...)"):
        trainer().step(module(step), [{"no": "samples"}])


def python(x: Tensor) -> None:
    bytearray(2**62)


def device(x: Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize(
    ("fault", "kind"), [(python, MemoryError), (device, torch.OutOfMemoryError)]
)
def test_f46_whoever_is_out_of_memory(
    fault: Callable[[Tensor], None], kind: type[Exception]
) -> None:
    with surfaces(kind, "6 samples in 1 shard of 6", "microbatch_size=3"):
        trainer().step(module(lambda self, x: fault(x)), [data(6, 3)])


def test_f46_other_errors_have_no_such_note() -> None:
    def step(self: Any, x: Tensor) -> Any:
        raise RuntimeError("out of ideas")

    with surfaces(RuntimeError, "out of ideas") as found:
        trainer().step(module(step), [data(6, 3)])
    assert "microbatch_size" not in found.text


def test_f46_in_an_evaluation() -> None:
    net = module(lambda self, x: self.net(x).mean(), net=linear(3, 1))
    type(net).validation_step = lambda self, x: torch.empty(TOO_MUCH)
    with surfaces(RuntimeError, REFUSED, "6 samples in 3 shards of 2", "microbatch_size=1"):
        trainer(SingleDevice("cpu", shards=3)).validate(net, [data(6, 3)])


def test_f46_the_last_good_state_is_kept_and_goes_on(tmp_path: Path) -> None:
    def pause(where: str, step: int) -> None:
        if (where, step) == ("window", 7):
            torch.empty(TOO_MUCH)

    runs.fit(tmp_path / "whole")
    with surfaces(RuntimeError, REFUSED, "microbatch_size=2"):
        runs.fit(tmp_path / "broken", pause=pause)
    saved = checkpoint.load(tmp_path / "broken" / "last.ckpt")
    assert saved["global_step"] == 7 and not saved["mid_step"]
    runs.fit(tmp_path / "broken", ckpt_path="last", seed=1)
    expected, found = runs.everything(tmp_path / "whole"), runs.everything(tmp_path / "broken")
    assert all(map(torch.equal, expected, found))
