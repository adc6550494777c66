"""Hooks: who is called, in which order, with what; and where what they log goes."""

from typing import Any

import pytest

from composefit import Callback, LoopModule
from composefit.hooks import HookCaller
from composefit.logged import Logged


class Module(LoopModule):
    """Remembers the calls of its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []


def caller(module: LoopModule, *callbacks: Callback) -> tuple[HookCaller, list[dict[str, Any]]]:
    heard: list[dict[str, Any]] = []

    def hear(logs: dict[str, Logged]) -> None:
        heard.append({name: (logged.value, logged.options) for name, logged in logs.items()})

    return HookCaller("the trainer", module, callbacks, hear), heard


def test_callbacks_run_in_their_order_then_the_module_then_who_saves_state() -> None:
    class Own(Module):
        def on_train_start(self) -> None:
            self.calls.append("module")

    class Named(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_start(self, trainer: Any, module: Any) -> None:
            assert trainer == "the trainer"
            module.calls.append(self.name)

    class Saving(Named):
        saves_state = True

    module = Own()
    call, _ = caller(module, Saving("saves"), Named("a"), Named("b"))
    call("on_train_start")
    assert module.calls == ["a", "b", "module", "saves"]


def test_hooks_may_declare_fewer_arguments_than_they_are_offered() -> None:
    class Own(Module):
        def on_train_batch_end(self, outputs: Any) -> None:  # type: ignore[override]
            self.calls.append((outputs,))

        def on_train_batch_start(self) -> None:  # type: ignore[override]
            self.calls.append(())

        def on_validation_batch_start(self, *args: Any) -> None:
            self.calls.append(args)

    class Nothing(Callback):
        def on_train_batch_end(self) -> None:  # type: ignore[override]
            made.append("nothing")

    class TrainerOnly(Callback):
        def on_train_batch_end(self, trainer: Any) -> None:  # type: ignore[override]
            made.append(trainer)

    class Two(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any) -> None:  # type: ignore[override]
            made.append((trainer, module))

    class Three(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, out: Any) -> None:  # type: ignore[override]
            made.append(out)

    class Everything(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            made.append(args)

    class More(Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int, extra: str = "none"
        ) -> None:
            made.append((i, extra))

    made: list[Any] = []
    module = Own()
    call, _ = caller(module, Nothing(), TrainerOnly(), Two(), Three(), Everything(), More())
    call("on_train_batch_end", "out", "batch", 3)
    whole = ("the trainer", module, "out", "batch", 3)
    assert made == ["nothing", "the trainer", ("the trainer", module), "out", whole, (3, "none")]
    call("on_train_batch_start", "batch", 3)
    call("on_validation_batch_start", "batch", 3)
    assert module.calls == [("out",), (), ("batch", 3)]


def test_hooks_nobody_has_written_are_known_beforehand() -> None:
    class Own(Module):
        def on_train_start(self) -> None: ...

    call, _ = caller(Own(), Callback())
    assert call.anybody("on_train_start", 0)
    assert not call.anybody("on_train_end", 0)


def test_a_hook_may_be_set_on_the_object() -> None:
    module = Module()
    module.on_train_end = lambda: module.calls.append("end")  # type: ignore[method-assign]
    call, _ = caller(module)
    call("on_train_end")
    assert module.calls == ["end"]


def test_setup_and_teardown_are_hooks_of_the_module_too() -> None:
    class Own(Module):
        def setup(self, stage: str) -> None:
            self.calls.append(stage)

    module = Own()
    call, _ = caller(module)
    call("setup", "fit")
    assert module.calls == ["fit"]


@pytest.mark.parametrize("name", ["on_train_batch_start", "on_before_optimizer_step"])
def test_hooks_around_a_step_log_per_step(name: str) -> None:
    class Logging(Callback):
        pass

    setattr(Logging, name, lambda self, trainer, module: module.log("x", 1.0))
    call, heard = caller(Module(), Logging())
    call(name, "a", "b")
    ((_, options),) = heard[0].values()
    assert (options.on_step, options.on_epoch) == (True, False)


@pytest.mark.parametrize("name", ["on_train_epoch_end", "on_validation_epoch_end", "on_fit_start"])
def test_other_hooks_log_per_epoch(name: str) -> None:
    module = Module()
    setattr(module, name, lambda: module.log("x", 1.0))
    call, heard = caller(module)
    call(name)
    ((_, options),) = heard[0].values()
    assert (options.on_step, options.on_epoch) == (False, True)


def test_what_hooks_log_is_heard_once_and_nothing_is_left_after_an_error() -> None:
    class Own(Module):
        def on_train_start(self) -> None:
            self.log("x", 1.0)

        def on_train_end(self) -> None:
            self.log("y", 2.0)
            raise KeyError

        def on_fit_end(self) -> None:
            self.calls.append("fit end")

    module = Own()
    call, heard = caller(module)
    call("on_train_start")
    with pytest.raises(KeyError):
        call("on_train_end")
    call("on_fit_end")
    assert [list(logs) for logs in heard] == [["x"]]
    with pytest.raises(RuntimeError, match="belongs in a step"):
        module.log("z", 1.0)


def test_hooks_have_no_samples_to_draw_for() -> None:
    class Own(Module):
        def on_train_start(self) -> None:
            self.random.normal(3)

    call, _ = caller(Own())
    with pytest.raises(RuntimeError, match="hooks have no samples"):
        call("on_train_start")


@pytest.mark.parametrize("who", ["module", "callback"])
def test_a_hook_that_yields_is_refused(who: str) -> None:
    class Own(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            yield batch

    class Yielding(Callback):
        def teardown(self, trainer: Any, module: Any, stage: str) -> Any:
            yield

    callbacks = [Yielding()] if who == "callback" else []
    name = "Yielding.teardown" if callbacks else "Own.on_train_batch_start"
    with pytest.raises(TypeError, match=f"{name} contains a yield"):
        caller(Module() if callbacks else Own(), *callbacks)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("on_before_backward", r"write on_before_optimizer_step\(self, optimizer, name\)"),
        ("optimizer_zero_grad", "leave it out"),
        ("on_exception", r"write it in a Callback"),
        ("validation_epoch_end", "on_validation_epoch_end"),
        ("on_epoch_end", "on_train_epoch_end"),
        ("on_train_epoch_ends", r"did you mean on_train_epoch_end\?"),
        ("on_val_batch_end", r"did you mean on_validation_batch_end\?"),
        ("on_training_start", r"did you mean on_train_start\?"),
    ],
)
def test_what_looks_like_a_hook_and_would_never_run_is_refused(name: str, instead: str) -> None:
    own = type("Own", (Module,), {name: lambda self, *args: None})
    derived = type("Derived", (own,), {})
    with pytest.raises(TypeError, match=rf"Derived\.{name} is no hook that is called: .*{instead}"):
        caller(derived())


@pytest.mark.parametrize(
    "name", ["on_owner", "on_train_batch_end_extra", "on_test_epoch_end", "setup", "step_optimizer"]
)
def test_methods_of_the_users_own_are_no_hooks(name: str) -> None:
    caller(type("Own", (Module,), {name: lambda self, *args: None})())
