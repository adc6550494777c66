"""`call`: a method of a trainer, run by processes of its own, as if it had been run here.

send the trainer's arguments, its callbacks and loggers, the module and the method's arguments
in each process: the same trainer again, and the method
from rank 0 back: what the method has returned, and the content of all that has been sent
put that in place here
"""

from __future__ import annotations

import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from composefit.lockstep.driver import Lockstep
from composefit.module import LoopModule
from composefit.ranks.environment import found_job
from composefit.ranks.launch import launch
from composefit.ranks.mirror import Mirror, Sent
from composefit.ranks.parcels import culprit, pack, unpack
from composefit.ranks.world import World
from composefit.seeding import global_states, restore_global_states
from composefit.strategies import Strategy

if TYPE_CHECKING:
    from composefit.trainer import Trainer

__all__ = ["call"]

# What of a trainer goes on from one run to the next, beside its arguments.
_POSITION = (
    "callbacks",
    "_defaults",
    "_brought",
    "loggers",
    "history",
    "global_step",
    "module",
    "datamodule",
)

# What a run leaves in a trainer, beside that.
_LEFT = (
    "should_stop",
    "mid_step",
    "ready",
    "run_seed",
    "logs",
    "num_training_batches",
    "num_val_batches",
    "_whole_epoch",
)

# What a training leaves, where it can be pickled.
_TRAINED = ("training", "fit_loop", "loop")

# Arguments that are data: what a run does to them stays where it runs.
_DATA = ("train_dataloaders", "val_dataloaders", "dataloaders", "datamodule")


def call(trainer: Trainer, method: str, module: LoopModule, arguments: dict[str, Any]) -> Any:
    """Run a method of a trainer in as many processes as its strategy asks for.

    Afterwards everything is as if it had run here: parameters and buffers, which stay the objects
    that they are, attributes of the module, of callbacks and of loggers, lists and dicts that they
    or functions of the script refer to, counters, metrics, history, optimizers, and the states of
    the global random generators. That holds for a run that fails, too, as far as rank 0 gets to
    send it.

    What is not so: loaders and data modules stay as they were; hooks that were registered on a
    module, and attributes that cannot be pickled, are lost (a warning names those of the module);
    `trainer.strategy` has no world, and `trainer.step` cannot go on. What was sharded is whole.

    Args:
        trainer: is not in a run.
        method: `"fit"`, `"validate"`, `"test"`, `"predict"` or `"run"`.
        module: its first argument (for `"run"`, its second).
        arguments: the others, by name.

    Returns:
        What the method returns in rank 0.

    Raises:
        TypeError: something that has to be sent cannot be pickled; it is named.
        Whatever the method raises; see `composefit.ranks.launch.launch`.
    """
    processes = trainer.strategy.processes_to_launch()
    assert processes is not None
    with tempfile.TemporaryDirectory(prefix="composefit-") as name:
        folder = Path(name)
        sent, until = _send(folder / "there", trainer, method, module, arguments)
        try:
            result = launch(_serve, processes, name, until, timeout=_timeout(trainer.strategy))[0]
        except BaseException:
            # The error is what the caller is to see, whatever is wrong with what came with it.
            with suppress(Exception):
                _take_back(folder / "back", trainer, sent)
            raise
        finally:
            module.trainer = trainer
        _take_back(folder / "back", trainer, sent)
        return result


def _timeout(strategy: Strategy) -> float | None:
    return getattr(strategy, "timeout", None)


# -- there -------------------------------------------------------------------------------------


def _send(
    path: Path, trainer: Trainer, method: str, module: LoopModule, arguments: dict[str, Any]
) -> tuple[Sent, int]:
    """Write all that a process needs.

    Returns:
        What was sent, and the number from which on it is data.
    """
    sent = Sent()
    position = {name: getattr(trainer, name) for name in _POSITION}
    position["_resumed_epoch"] = trainer.current_epoch
    data = {name: value for name, value in arguments.items() if name in _DATA}
    data["the last data module"] = position.pop("datamodule")
    other = {name: value for name, value in arguments.items() if name not in _DATA}
    until = 0

    def known(obj: Any) -> Any:
        if obj is trainer:
            return type(trainer)
        sent.known(obj)
        return None

    def parts() -> Iterator[Any]:
        nonlocal until
        yield trainer
        yield method
        yield global_states()
        yield trainer.arguments, position, module, other
        until, sent.contents = len(sent.objects), False
        yield data
        yield sent.objects

    try:
        pack(path, parts(), known)
    except Exception as error:
        named = {**trainer.arguments, "callbacks": trainer.callbacks, "loggers": trainer.loggers}
        for label, value in {**data, **other, "module": module, **named}.items():
            found = culprit(value, label, lambda obj: True if obj is trainer else None)
            if found is not None:
                raise _refusal(*found) from error
        raise
    return sent, until


def _refusal(path: str, value: Any, error: Exception) -> TypeError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    write = "make it in setup(), which every process runs, or leave it out in __getstate__"
    if isinstance(value, Iterator):
        write = "give something that can be iterated again: a list, a Dataset, a DataLoader"
    return TypeError(
        f"{path} is a {kind}, and cannot be sent to the processes that run the training ({error}): "
        f"{write}. Or start the script with torchrun: then each process makes its own"
    )


# -- in each process ---------------------------------------------------------------------------


def _serve(name: str, until: int) -> Any:
    """Run the method that is in a folder; rank 0 leaves there what has become of everything."""
    folder = Path(name)
    trainer: Any = None

    def resolve(kind: type[Trainer]) -> Any:
        # What refers to the trainer, its own callbacks too, is there before it can be made.
        nonlocal trainer
        trainer = trainer or kind.__new__(kind)
        return trainer

    unpacked = unpack(folder / "there", resolve)
    _, method, states, (arguments, position, module, other), data, objects = unpacked
    mirror = Mirror(objects, until)
    trainer.__init__(**arguments)
    vars(trainer).update(position, datamodule=data.pop("the last data module"))
    restore_global_states(states)
    first = "module" if method == "run" else "model"
    job = found_job()  # not trainer.global_rank: after an error there may be no world to ask
    assert job is not None
    try:
        result = getattr(trainer, method)(**{first: module}, **other, **data)
        whole = trainer.strategy.release(module, job.rank == 0)
        _make_whole(trainer, whole)
    except BaseException:
        if job.rank == 0:
            with suppress(Exception):
                _send_back(folder / "back", trainer, module, other, mirror, {})
        raise
    if job.rank:
        return None
    _send_back(folder / "back", trainer, module, other, mirror, whole)
    return result


def _make_whole(trainer: Trainer, whole: Mapping[int, Tensor]) -> None:
    """Optimizers and callbacks of a sharded training as those of any other; all ranks call it.

    Args:
        trainer: its module was released.
        whole: by the id of each parameter that was sharded, the whole one in its place.
    """
    strategy = trainer.strategy
    if not strategy.shards_state:
        return
    for callback in trainer.callbacks:
        kept = vars(callback)
        kept.update({name: strategy.full_state(value) for name, value in kept.items()})
    for one in trainer.optimizers.values():
        optimizer = one.optimizer
        full = strategy.full_state(dict(optimizer.state))
        states = {whole.get(id(parameter), parameter): state for parameter, state in full.items()}
        optimizer.state = defaultdict(dict, states)
        for group in optimizer.param_groups:
            group["params"] = [whole.get(id(one), one) for one in group["params"]]


class _Ended:
    """In place of a driver that has run in other processes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(
            "this training has run in processes of its own, which have ended, and no step can be "
            "added to it here: call trainer.fit, with ckpt_path to go on from a checkpoint; or, "
            "for a loop that calls trainer.step, give the loop to trainer.run, or start the "
            "script with torchrun"
        )


def _send_back(
    path: Path,
    trainer: Any,
    module: LoopModule,
    other: dict[str, Any],
    mirror: Mirror,
    whole: Mapping[int, Tensor],
) -> None:
    def special(obj: Any) -> Any:
        if obj is trainer:
            return "trainer"
        if obj is trainer.strategy:
            return "strategy"
        if isinstance(obj, Strategy):  # the caller's is as it was, without a world
            number = mirror.number(obj)
            return "nothing" if number is None else number
        if isinstance(obj, Lockstep | World | dist.ProcessGroup):
            return "nothing"
        if id(obj) in whole:
            return whole[id(obj)]
        if hasattr(obj, "full_tensor"):
            raise TypeError("a part of a sharded tensor")
        return None

    def parts() -> Iterator[Any]:
        yield {name: vars(trainer)[name] for name in (*_POSITION, *_LEFT)}
        yield trainer.current_epoch, trainer.evaluation.logs, trainer.evaluation.numbers
        trained = {name: vars(trainer)[name] for name in _TRAINED}
        yield {n: None if mirror.refusal(value) else value for n, value in trained.items()}
        yield global_states()
        roots = [module, *other.values()]
        yield list(mirror.changes(roots, [*module.parameters(), *module.buffers()]))
        yield [(name, str(error)) for name, error in mirror.lost]

    mirror.special = special
    beside = path.with_suffix(".tmp")
    pack(beside, parts(), mirror.known)
    beside.replace(path)


# -- here again --------------------------------------------------------------------------------


def _take_back(path: Path, trainer: Trainer, sent: Sent) -> None:
    def resolve(known: Any) -> Any:
        if isinstance(known, int):
            return sent.objects[known]
        if isinstance(known, str):
            return {"trainer": trainer, "strategy": trainer.strategy, "nothing": None}[known]
        return known  # the whole of what is sharded there

    left, (epoch, logs, numbers), trained, states, changes, lost = unpack(path, resolve)
    for number, content, left_out in changes:
        sent.apply(number, content, left_out)
    vars(trainer).update(left, _resumed_epoch=epoch, _heard=left["logs"])
    trainer.evaluation.logs, trainer.evaluation.numbers = logs, numbers
    if trained["training"] is not None:
        trained["training"].driver = _Ended()
        vars(trainer).update(trained)
    restore_global_states(states)
    kind = type(trainer.module).__name__
    for name, error in lost:
        if name.startswith(f"{kind}."):
            warnings.warn(
                f"{name} did not come back from the processes that have run the training, since it "
                f"cannot be pickled ({error}): it is here as it was before",
                stacklevel=5,
            )
