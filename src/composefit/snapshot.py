"""The state of a trainer as plain data, and back: what a checkpoint holds."""

from __future__ import annotations

import copy
import pickle
import platform
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from composefit import checkpoint, saved
from composefit.callbacks import Callback, ModelCheckpoint
from composefit.data import Batches
from composefit.loops import Loop
from composefit.metric_types import Metric
from composefit.module import LoopModule
from composefit.random import hash_key
from composefit.ranks import World
from composefit.seeding import global_states, restore_global_states

if TYPE_CHECKING:
    from composefit.trainer import Trainer

#: Where a checkpoint was found, and what is in it.
Found: TypeAlias = tuple[Path, dict[str, Any]]

Result = TypeVar("Result")

_AS_THEN = "make them as they were, or load the weights alone with load_from_checkpoint"


def take(
    trainer: Trainer, weights_only: bool = False, trainable_only: bool = False
) -> dict[str, Any]:
    """The state of a trainer, between two steps; all ranks call it.

    It is the whole job's: what ranks have logged and counted apart is added up, and what is a
    rank's own (its generators, its place in its own part of the data) is there for each. Everything
    else is the same on all ranks. So it goes on with any number of ranks, one among them.

    Args:
        trainer: has a module.
        weights_only: module and hyperparameters alone; no training can go on from it.
        trainable_only: of the module only what is trained, and buffers.

    Returns:
        Plain data; its tensors are the module's and the optimizers' own.
    """
    module = trainer.module
    assert module is not None
    weights = module.state_dict()
    if trainable_only:
        frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
        weights = {name: value for name, value in weights.items() if name not in frozen}
    state: dict[str, Any] = {
        "composefit_checkpoint": checkpoint.FORMAT,
        "versions": _versions(),
        "state_dict": weights,
        "trainable_only": trainable_only,
        "hyper_parameters": dict(module.hparams),
        "hparams_name": module.hparams.given_as,
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "mid_step": trainer.mid_step,
    }
    training, loop, world = trainer.training, trainer.loop, trainer.world
    if training is not None and not weights_only:
        if world is not None:
            metrics = trainer.rank_metrics
            trainer.logs.exchange(world, metrics, whole=True)
            trainer.evaluation.logs.exchange(world, metrics)
        named = training.optimizers.items()
        state |= {
            "optimizers": {
                name: {"class": type(one.optimizer).__qualname__, **one.optimizer.state_dict()}
                for name, one in named
            },
            "schedulers": {
                name: [_of_scheduler(s.scheduler) for s in one.schedulers] for name, one in named
            },
            "loss_scales": {n: scale.state_dict() for n, scale in training.stepper.scales.items()},
            "updates": dict(training.stepper.updates),
            "samples_seen": training.samples_seen,
            "loop": {} if loop is None else {"class": type(loop).__name__, **loop.state_dict()},
            "metrics": {name: _of_metric(metric) for name, metric in _metrics(module)},
            "logs": trainer.logs.state_dict(module),
            "evaluation_logs": trainer.evaluation.logs.state_dict(module),
            "callbacks": {key: s for key, c in keyed(trainer.callbacks) if (s := c.state_dict())},
            "loggers": [
                {"step": trainer.global_step, **one.state_dict()} for one in trainer.loggers
            ],
            "history": trainer.history.state_dict(),
            "data": {} if trainer.datamodule is None else trainer.datamodule.state_dict(),
            "seed": trainer.run_seed,
            **_of_ranks(world, loop),
        }
    return state


def write(trainer: Trainer, path: str | Path, state: dict[str, Any]) -> None:
    """Write a state: rank 0 a file, or where tensors are cut over ranks, all of them a folder.

    All ranks call it, and none goes on before it is there.

    Raises:
        TypeError, OSError: it could not be written; on every rank.
    """
    world = trainer.world
    if trainer.strategy.shards_state and world is not None:
        from composefit import sharded_checkpoint  # torch's part of it takes a second to import

        plain, tensors = sharded_checkpoint.part(state)
        if tensors:
            sharded_checkpoint.save(path, plain, tensors, world)
            return
    state = trainer.strategy.full_state(state)
    _on_first(world, f"the checkpoint {path}", lambda: checkpoint.save(path, state))


def _of_ranks(world: World | None, loop: Loop | None) -> dict[str, Any]:
    """What is a rank's own, of all ranks."""
    loaders = {} if loop is None else dict(_loaders(loop))
    generators = global_states()
    own = {name: batches.rank_state() for name, batches in loaders.items()}
    if world is None:
        everyone = [(generators, own)]
    else:
        everyone = world.gather("what is a rank's own in a checkpoint", (generators, own))
    states = [one for one, _ in everyone]
    found: dict[str, Any] = {"random": states[0]}
    if not all(_equal(one, states[0]) for one in states):
        found["random_of_ranks"] = states
    by_rank = {name: [of_rank[name] for _, of_rank in everyone] for name in own}
    kept = {name: states for name, states in by_rank.items() if states != [None] * len(states)}
    return found | {"loaders_of_ranks": kept} if kept else found


def _restore_generators(world: World | None, state: dict[str, Any]) -> None:
    """This rank's generators; a rank that was not there then begins with draws of its own."""
    rank = 0 if world is None else world.rank
    states = state.get("random_of_ranks", [state["random"]])
    restore_global_states(states[min(rank, len(states) - 1)])
    if len(states) > 1 and rank >= len(states):  # not the last one's draws once more
        seed = hash_key(state["seed"], state["global_step"], rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)


def _loaders(loop: Loop, path: str = "") -> Iterator[tuple[str, Batches]]:
    """The loaders whose places are in a loop's state, by the names of the attributes."""
    for name, value in vars(loop).items():
        if isinstance(value, Batches):
            yield path + name, value
        elif isinstance(value, Loop):
            yield from _loaders(value, f"{path}{name}.")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _on_first(world: World | None, what: str, function: Callable[[], Result]) -> Result:
    """What a function returns on rank 0, or raises there, on all ranks."""
    if world is None:
        return function()
    error: Exception | None = None
    said: tuple[bool, Any] = (True, None)
    if world.rank == 0:
        try:
            said = True, function()
        except Exception as raised:
            error, said = raised, (False, _as_plain(raised))
    # Rank 0 may have a large file to write, or a slow folder to look into.
    done, found = world.broadcast(what, said, patient=True)
    if error is not None:
        raise error
    if not done:
        found.add_note("(on rank 0)")
        raise found
    return found  # type: ignore[no-any-return]


def _as_plain(error: Exception) -> Exception:
    """An error that can be told to other ranks."""
    try:
        copy.copy(error)  # as pickle makes it anew
        pickle.dumps(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def read(trainer: Trainer, ckpt_path: str | Path | None) -> Found | None:
    """A checkpoint, read and verified; all ranks call it, and read the file that rank 0 means.

    Args:
        trainer: whose checkpoint callbacks know what `"best"`, `"last"` and `"auto"` are.
        ckpt_path: a file, or one of these; None for none.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it is damaged, or ranks have read different files under this name.
        ValueError: it is none of a trainer's.
    """
    if ckpt_path is None:
        return None
    world = trainer.world
    what = f"which checkpoint {ckpt_path} is"
    path = _on_first(world, what, lambda: _find(trainer, ckpt_path))
    if path is None:
        return None
    try:
        state = saved.load(path, world)
    except FileNotFoundError as error:
        if world is not None:
            error.add_note(
                f"rank {world.rank} has no such file: every rank reads the checkpoint itself, so "
                "its folder must be one that all machines share"
            )
        raise
    checkpoint.of_trainer(state, path)
    if world is not None:
        steps = [
            step for (step,) in world.agree(f"{path}, read", state["global_step"], patient=True)
        ]
        if len(set(steps)) > 1:
            raise RuntimeError(
                f"ranks have read different files as {path}: they are of the steps {steps}, in "
                "rank order. Give a folder that all machines share"
            )
    return path, state


def _find(trainer: Trainer, ckpt_path: str | Path) -> Path | None:
    checkpoint.refuse_address(ckpt_path)  # before it becomes a Path, which takes a slash away
    callbacks = trainer.checkpoint_callbacks
    if ckpt_path == "best":
        judging = sorted(callbacks, key=lambda one: one.monitor is None)
        best = [Path(one.best_model_path) for one in judging if one.best_model_path]
        if not best:
            raise ValueError(
                "ckpt_path='best', and no ModelCheckpoint(monitor=...) of this trainer has "
                "written one yet: give a path"
            )
        return best[0]
    if ckpt_path not in ("last", "auto"):
        return Path(ckpt_path).expanduser()
    folders = [Path(c.dirpath or trainer.default_root_dir).expanduser() for c in callbacks]
    places = [folder / ModelCheckpoint.LAST for folder in folders]
    places = places or [trainer.default_root_dir / ModelCheckpoint.LAST]
    there = [place for place in places if checkpoint.where(place).exists()]
    if there:
        return max(there, key=lambda place: checkpoint.where(place).stat().st_mtime)
    if ckpt_path == "auto":
        return None
    raise FileNotFoundError(
        f"ckpt_path='last', and there is no {' or '.join(map(str, places))} yet: write "
        "ckpt_path='auto' to begin from the start where there is none"
    )


def load_weights(trainer: Trainer, module: LoopModule, found: Found | None) -> None:
    """Load the module of a checkpoint, and nothing else of it."""
    if found is not None:
        path, state = found
        tell_of_load(trainer, module, state)
        weights = trainer.strategy.load_weights(module, state["state_dict"])
        checkpoint.load_module(module, weights, path, not state["trainable_only"])


def tell_of_load(trainer: Trainer, module: LoopModule, state: dict[str, Any]) -> None:
    """Hooks that may change a state before anything of it is taken back: rename keys, say."""
    module.on_load_checkpoint(state)
    for callback in trainer.callbacks:
        callback.on_load_checkpoint(trainer, module, state)


def refuse_misfit(trainer: Trainer, path: Path, state: dict[str, Any]) -> None:
    """Raise for a state that does not fit, before anything of it is loaded.

    Raises:
        RuntimeError: of another module, or a damaged one: the names are grouped.
        ValueError: of other optimizers, schedulers or loops, or weights alone.
    """
    module, training, loop = trainer.module, trainer.training, trainer.loop
    assert module is not None and training is not None
    if "optimizers" not in state:
        raise ValueError(
            f"{path} holds weights only, and no training can go on from them: write "
            f"{type(module).__name__}.load_from_checkpoint(path), and fit without ckpt_path"
        )
    difference = checkpoint.module_difference(
        module, state["state_dict"], not state["trainable_only"]
    )
    if difference:
        raise checkpoint.misfit(module, difference, path)
    own = {name: type(one.optimizer).__qualname__ for name, one in training.optimizers.items()}
    theirs = {name: one["class"] for name, one in state["optimizers"].items()}
    if own != theirs:
        raise ValueError(
            f"{path} was written with the optimizers {_listed(theirs)}, and configure_optimizers "
            f"has made {_listed(own)}: {_AS_THEN}"
        )
    for name, one in training.optimizers.items():
        here = [len(group["params"]) for group in one.optimizer.param_groups]
        there = [len(group["params"]) for group in state["optimizers"][name]["param_groups"]]
        if here != there:
            raise ValueError(
                f"{path}: the optimizer {name!r} had groups of {there} parameters, now of {here}: "
                f"{_AS_THEN}"
            )
        kinds = [type(s.scheduler).__name__ for s in one.schedulers]
        kept = [s["class"] for s in state["schedulers"][name]]
        if kinds != kept:
            raise ValueError(
                f"{path}: the optimizer {name!r} had the schedulers {kept}, now {kinds}: {_AS_THEN}"
            )
    kind = state["loop"].get("class")
    if loop is not None and kind != type(loop).__name__:
        raise ValueError(
            f"{path} was written by {kind}, and {type(loop).__name__} is to go on: run such a loop "
            "with trainer.run(loop, module, ckpt_path=path), or load the weights alone with "
            "load_from_checkpoint"
        )


def restore(trainer: Trainer, path: Path, state: dict[str, Any]) -> None:
    """Go on from a state: what does not fit raises before anything has changed.

    Raises:
        RuntimeError, ValueError: see `refuse_misfit`.

    Warns:
        UserWarning: the state was written within a step that failed, or holds the state of
            callbacks that are not there.
    """
    module, training, loop = trainer.module, trainer.training, trainer.loop
    assert module is not None and training is not None
    tell_of_load(trainer, module, state)
    refuse_misfit(trainer, path, state)
    if state["mid_step"]:
        warnings.warn(
            f"{path} was written after step {state['global_step']} failed between two of its "
            "updates: the step is done again as a whole, so its first updates come twice",
            stacklevel=2,
        )
    if loop is not None:  # first, since its loaders may refuse the state of others
        loop.load_state_dict({k: v for k, v in state["loop"].items() if k != "class"})
        loaders = dict(_loaders(loop))
        for name, of_ranks in state.get("loaders_of_ranks", {}).items():
            if name in loaders:
                loaders[name].load_rank_states(of_ranks)
    weights = trainer.strategy.load_weights(module, state["state_dict"])
    module.load_state_dict(weights, strict=False)
    for name, one in training.optimizers.items():
        kept = {key: value for key, value in state["optimizers"][name].items() if key != "class"}
        kept = trainer.strategy.load_optimizer(one.optimizer, kept)
        one.optimizer.load_state_dict(kept)
        if state["updates"][name]:  # torch warns of schedulers that step before their optimizer
            one.optimizer._opt_called = True  # type: ignore[attr-defined]
        for schedule, scheduler in zip(one.schedulers, state["schedulers"][name], strict=True):
            schedule.scheduler.load_state_dict(scheduler["state"])
    for name, kept in state["loss_scales"].items():
        scale = training.stepper.scale(name)
        if scale is not None:
            scale.load_state_dict(kept)
    training.stepper.updates.update(state["updates"])
    training.samples_seen = state["samples_seen"]
    trainer.global_step = state["global_step"]
    trainer.seed_run(state["seed"])
    for name, metric in _metrics(module):
        if name in state["metrics"]:
            _load_metric(metric, state["metrics"][name])
    if trainer.rank_metrics is not None:
        trainer.rank_metrics.forget()  # they are whole, on every rank
    trainer.logs.load_state_dict(state["logs"], module)
    trainer.evaluation.logs.load_state_dict(state["evaluation_logs"], module)
    _load_callbacks(trainer.callbacks, state["callbacks"])
    for logger, kept in zip(trainer.loggers, state["loggers"], strict=False):
        logger.load_state_dict(kept)
    trainer.history.load_state_dict(state["history"])
    _restore_generators(trainer.world, state)


def keyed(callbacks: list[Callback]) -> Iterator[tuple[str, Callback]]:
    """Each callback under the name of its state; a second one of a name is `name#2`."""
    seen: Counter[str] = Counter()
    for callback in callbacks:
        key = callback.state_key
        seen[key] += 1
        yield (f"{key}#{seen[key]}" if seen[key] > 1 else key), callback


def _load_callbacks(callbacks: list[Callback], states: dict[str, Any]) -> None:
    left = dict(states)
    for key, callback in keyed(callbacks):
        if key in left:
            callback.load_state_dict(left.pop(key))
    if left:
        warnings.warn(
            f"the checkpoint holds the state of callbacks that are not there: {sorted(left)}",
            stacklevel=3,
        )


# -- parts -------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    try:
        own = version("composefit")
    except PackageNotFoundError:  # used from its sources
        own = "unknown"
    return {"composefit": own, "torch": str(torch.__version__), "python": platform.python_version()}


def _listed(optimizers: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in optimizers.items())


def _of_scheduler(scheduler: Any) -> dict[str, Any]:
    return {"class": type(scheduler).__name__, "state": scheduler.state_dict()}


def _metrics(module: nn.Module) -> Iterator[tuple[str, Metric]]:
    return ((name, part) for name, part in module.named_modules() if isinstance(part, Metric))


def _of_metric(metric: Metric) -> dict[str, Any]:
    """Its sums so far, which a metric keeps out of its state_dict."""
    states = {name: getattr(metric, name) for name in metric._defaults}
    return {"states": states, "updates": metric._update_count}


def _load_metric(metric: Metric, kept: dict[str, Any]) -> None:
    metric.reset()
    for name, value in kept["states"].items():
        if isinstance(value, Tensor):
            value = value.to(metric.device)
        elif isinstance(value, list):
            value = [item.to(metric.device) for item in value]
        setattr(metric, name, value)
    metric._update_count = kept["updates"]
    metric._computed = None
