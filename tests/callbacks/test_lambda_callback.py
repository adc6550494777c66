import inspect

import pytest

from composefit.callbacks import Callback, LambdaCallback
from composefit.hooks import HookCaller
from composefit.module import LoopModule
from tests.callbacks.fake import SteppedTrainer


def test_functions_run_as_hooks(tmp_path):
    seen = []
    callback = LambdaCallback(
        setup=lambda trainer, module, stage: seen.append(stage),
        on_train_epoch_end=lambda trainer, module: seen.append(trainer.current_epoch),
    )
    trainer = SteppedTrainer(tmp_path, callback)
    trainer.begin()
    trainer.epoch()
    trainer.epoch()
    assert seen == ["fit", 0, 1]


def test_functions_may_declare_fewer_arguments():
    seen = []
    callback = LambdaCallback(
        on_train_batch_end=lambda trainer: seen.append(trainer),
        on_fit_start=lambda: seen.append("start"),
    )
    call = HookCaller("trainer", LoopModule(), [callback], lambda logs: None)
    call("on_fit_start")
    call("on_train_batch_end", "outputs", "batch", 0)
    call("on_fit_end")
    assert seen == ["start", "trainer"]


def test_every_hook_is_known_and_nothing_else():
    for name, _ in inspect.getmembers(Callback, inspect.isfunction):
        if name.startswith("on_") or name in ("setup", "teardown"):
            assert getattr(LambdaCallback(**{name: print}), name) is print
        else:
            with pytest.raises(TypeError, match="has no hook"):
                LambdaCallback(**{name: print})


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(TypeError, match="'on_train_epoch_ends'; did you mean 'on_train_epoch_end'"):
        LambdaCallback(on_train_epoch_ends=print)
    with pytest.raises(TypeError, match="no hook 'zzz'; known are setup, "):
        LambdaCallback(zzz=print)


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="on_fit_end must be a function, got 3"):
        LambdaCallback(on_fit_end=3)  # type: ignore[arg-type]
