from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from composefit import LoopModule, checkpoint
from composefit.callbacks import ModelCheckpoint
from composefit.hooks import HookCaller
from tests.callbacks.fake import Pair, SteppedTrainer, batches, fit


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def own_state(path: str | Path, callback: ModelCheckpoint) -> dict[str, Any]:
    state = checkpoint.load(path)["callbacks"][callback.state_key]
    assert isinstance(state, dict)
    return state


def run(trainer: SteppedTrainer, losses: list[float]) -> None:
    trainer.begin()
    for loss in losses:
        trainer.epoch(val_loss=loss)
    trainer.end()


# -- the default -----------------------------------------------------------------------------------


def test_by_default_the_latest_state_is_kept_after_each_epoch(tmp_path):
    callback = ModelCheckpoint()
    trainer = SteppedTrainer(tmp_path, callback)
    trainer.begin()
    assert trainer.saved == []
    trainer.epoch()
    assert trainer.saved == ["last.ckpt"]
    trainer.epoch()
    trainer.end()  # what hooks do at the end of a fit is no part of a state to go on from
    assert trainer.saved == ["last.ckpt"] * 2
    assert files(tmp_path) == {"last.ckpt"}
    assert callback.last_model_path == callback.best_model_path == str(tmp_path / "last.ckpt")
    assert checkpoint.load(callback.last_model_path)["global_step"] == 4


def test_the_folder_is_the_one_given(tmp_path):
    callback = ModelCheckpoint(dirpath=tmp_path / "kept")
    run(SteppedTrainer(tmp_path / "root", callback), [1.0])
    assert files(tmp_path / "kept") == {"last.ckpt"}
    assert not (tmp_path / "root").exists()


def test_a_fit_without_a_step_writes_nothing(tmp_path):
    trainer = SteppedTrainer(tmp_path, ModelCheckpoint())
    run(trainer, [])
    assert trainer.saved == []


@pytest.mark.parametrize("reason", ["sanity_checking", "fast_dev_run"])
def test_a_trial_writes_nothing(tmp_path, reason):
    trainer = SteppedTrainer(tmp_path, ModelCheckpoint(), **{reason: True})
    trainer.begin()
    trainer.epoch()
    trainer.fail(RuntimeError())
    assert trainer.saved == []


def test_validation_outside_a_fit_writes_nothing(tmp_path):
    trainer = SteppedTrainer(
        tmp_path, ModelCheckpoint(monitor="x", save_on_train_epoch_end=False), stage="validate"
    )
    trainer.call("setup", "validate")
    trainer.validate(x=1.0)
    trainer.exception = RuntimeError()
    trainer.call("on_exception", trainer.exception)
    assert trainer.saved == []


def test_weights_only_and_trainable_only_are_passed_on(tmp_path):
    trainer = SteppedTrainer(
        tmp_path, ModelCheckpoint(save_weights_only=True, save_trainable_only=True)
    )
    run(trainer, [1.0])
    state = checkpoint.load(tmp_path / "last.ckpt")
    assert state["trainable_only"] and "callbacks" not in state


def test_every_rank_saves_and_rank_zero_deletes(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", save_last=False)
    trainer = SteppedTrainer(tmp_path, callback, is_global_zero=False)
    run(trainer, [2.0, 1.0])
    assert len(trainer.saved) == 2
    assert len(files(tmp_path)) == 2


# -- the best --------------------------------------------------------------------------------------


def test_the_best_k_are_kept_and_the_others_deleted(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=False)
    trainer = SteppedTrainer(tmp_path, callback)
    run(trainer, [0.5, 0.3, 0.4, 0.6, 0.2])
    assert files(tmp_path) == {"epoch=1-step=4.ckpt", "epoch=4-step=10.ckpt"}
    assert trainer.saved == [f"epoch={e}-step={2 * e + 2}.ckpt" for e in (0, 1, 2, 4)]
    assert callback.best_model_path == str(tmp_path / "epoch=4-step=10.ckpt")
    assert callback.best_model_score == 0.2
    assert callback.current_score == 0.2
    assert {Path(p).name: s.item() for p, s in callback.best_k_models.items()} == {
        "epoch=1-step=4.ckpt": 0.3,
        "epoch=4-step=10.ckpt": 0.2,
    }


def test_mode_max_keeps_the_largest(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", mode="max", save_last=False)
    run(SteppedTrainer(tmp_path, callback), [0.5, 0.7, 0.6])
    assert files(tmp_path) == {"epoch=1-step=4.ckpt"}
    assert callback.best_model_score == 0.7


def test_minus_one_keeps_all_and_zero_none(tmp_path):
    everything = ModelCheckpoint(monitor="val_loss", save_top_k=-1, dirpath=tmp_path / "all")
    nothing = ModelCheckpoint(monitor="val_loss", save_top_k=0, dirpath=tmp_path / "none")
    run(SteppedTrainer(tmp_path, everything, nothing), [0.5, 0.7, 0.6])
    assert len(files(tmp_path / "all")) == 4
    assert Path(everything.best_model_path).name == "epoch=0-step=2.ckpt"
    assert files(tmp_path / "none") == {"last.ckpt"}


def test_of_equal_values_the_older_stays(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=False)
    run(SteppedTrainer(tmp_path, callback), [0.5, 0.5, 0.5, 0.4])
    # The newest of the equal ones goes for a better one.
    assert files(tmp_path) == {"epoch=0-step=2.ckpt", "epoch=3-step=8.ckpt"}


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_is_never_among_the_best(tmp_path, mode):
    callback = ModelCheckpoint(monitor="val_loss", mode=mode, save_last=False)
    run(SteppedTrainer(tmp_path, callback), [float("nan"), 0.5, float("nan")])
    assert files(tmp_path) == {"epoch=1-step=4.ckpt"}
    assert callback.best_model_score == 0.5


def test_nan_is_not_the_best_where_all_are_kept(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=-1, save_last=False)
    run(SteppedTrainer(tmp_path, callback), [float("nan"), 0.5, 0.7])
    assert len(files(tmp_path)) == 3
    assert Path(callback.best_model_path).name == "epoch=1-step=4.ckpt"


def test_a_file_knows_that_it_is_the_best(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    run(SteppedTrainer(tmp_path, callback), [0.5, 0.3])
    for name in ("epoch=1-step=4.ckpt", "last.ckpt"):
        state = own_state(tmp_path / name, callback)
        assert state["best_model_path"] == str(tmp_path / "epoch=1-step=4.ckpt")
        assert state["best_model_score"] == 0.3
        assert len(state["best_k_models"]) == 2
    assert own_state(tmp_path / "last.ckpt", callback)["last_model_path"] == str(
        tmp_path / "last.ckpt"
    )


def test_a_file_that_could_not_be_written_does_not_count(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss")
    trainer = SteppedTrainer(tmp_path, callback)
    trainer.begin()
    trainer.epoch(val_loss=0.5)
    before = callback.state_dict()
    trainer.disk_full = True
    with pytest.raises(OSError, match="No space left"):
        trainer.epoch(val_loss=0.3)
    assert {**callback.state_dict(), "current_score": before["current_score"]} == before
    # The old best is deleted when the new one is there, not before.
    assert files(tmp_path) == {"epoch=0-step=2.ckpt", "last.ckpt"}
    trainer.disk_full = False
    trainer.epoch(val_loss=0.3)
    assert callback.best_model_score == 0.3


def test_a_dropped_file_is_there_until_the_new_ones_are_written(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss")
    trainer = SteppedTrainer(tmp_path, callback)
    trainer.begin()
    trainer.epoch(val_loss=0.5)
    seen = []
    save = trainer.save_checkpoint

    def watched(path: str, **options: Any) -> None:
        save(path, **options)
        seen.append((Path(path).name, (tmp_path / "epoch=0-step=2.ckpt").exists()))

    trainer.save_checkpoint = watched  # type: ignore[method-assign]
    trainer.epoch(val_loss=0.3)
    assert seen == [("epoch=1-step=4.ckpt", True), ("last.ckpt", True)]
    assert files(tmp_path) == {"epoch=1-step=4.ckpt", "last.ckpt"}


def test_a_file_that_cannot_be_deleted_warns_and_the_training_goes_on(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", save_last=False)
    trainer = SteppedTrainer(tmp_path, callback)
    trainer.begin()
    trainer.epoch(val_loss=0.5)
    (tmp_path / "epoch=0-step=2.ckpt").unlink()
    (tmp_path / "epoch=0-step=2.ckpt").mkdir()
    with pytest.warns(UserWarning, match="could not be deleted"):
        trainer.epoch(val_loss=0.3)
    assert callback.best_model_score == 0.3


def test_an_unknown_monitor_is_an_error_that_lists_what_is_logged(tmp_path):
    trainer = SteppedTrainer(tmp_path, ModelCheckpoint(monitor="val_los"))
    trainer.begin()
    with pytest.raises(ValueError, match=r"needs 'val_los', .*logged are \['val_loss'\]"):
        trainer.epoch(val_loss=0.5)


# -- without a monitor -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"save_top_k": -1}, {"filename": "{epoch}-{step}"}])
def test_without_a_monitor_every_state_can_be_kept(tmp_path, settings):
    callback = ModelCheckpoint(**settings)
    run(SteppedTrainer(tmp_path, callback), [1.0, 1.0])
    assert files(tmp_path) == {"epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt", "last.ckpt"}
    assert callback.best_model_path == str(tmp_path / "epoch=1-step=4.ckpt")


def test_without_a_monitor_and_without_last_the_newest_is_kept(tmp_path):
    run(SteppedTrainer(tmp_path, ModelCheckpoint(save_last=False)), [1.0, 1.0])
    assert files(tmp_path) == {"epoch=1-step=4.ckpt"}


# -- when ------------------------------------------------------------------------------------------


def test_every_n_epochs(tmp_path):
    trainer = SteppedTrainer(tmp_path, ModelCheckpoint(filename="{epoch}", every_n_epochs=2))
    run(trainer, [1.0] * 5)
    # The fit's end is saved whatever its epoch.
    assert trainer.saved == ["epoch=1.ckpt", "last.ckpt", "epoch=3.ckpt", "last.ckpt", "last.ckpt"]


def test_every_n_train_steps(tmp_path):
    trainer = SteppedTrainer(tmp_path, ModelCheckpoint(filename="{step}", every_n_train_steps=2))
    trainer.begin()
    for _ in range(5):
        trainer.step()
    assert trainer.saved == ["step=2.ckpt", "last.ckpt", "step=4.ckpt", "last.ckpt"]


@pytest.mark.parametrize("interval", [timedelta(seconds=90), 1.5])
def test_every_so_many_minutes(tmp_path, interval):
    clock = SimpleNamespace(now=100.0)
    trainer = SteppedTrainer(
        tmp_path,
        ModelCheckpoint(filename="{step}", train_time_interval=interval, save_last=False),
        clock=lambda: clock.now,
    )
    trainer.begin()
    for _ in range(6):
        clock.now += 40.0
        trainer.step()
    assert trainer.saved == ["step=3.ckpt", "step=6.ckpt"]


def test_nothing_is_called_after_each_batch_where_nothing_is_saved_by_steps():
    def called(callback: ModelCheckpoint) -> bool:
        call = HookCaller(None, LoopModule(), [callback], lambda logs: None)
        return call.anybody("on_train_batch_end", 3)

    assert not called(ModelCheckpoint())
    assert called(ModelCheckpoint(every_n_train_steps=1))
    assert called(ModelCheckpoint(train_time_interval=1))


def test_triggers_that_coincide_write_the_latest_once(tmp_path):
    trainer = SteppedTrainer(
        tmp_path, ModelCheckpoint(every_n_train_steps=2, train_time_interval=0.0, every_n_epochs=1)
    )
    trainer.begin()
    trainer.epoch()
    # By time after step 1; by time, steps and epochs after step 2.
    assert trainer.saved == ["last.ckpt"] * 2


def test_the_latest_is_written_again_for_a_step_whose_judgement_came_later(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", every_n_train_steps=2, every_n_epochs=1)
    trainer = SteppedTrainer(tmp_path, callback)
    trainer.begin()
    trainer.epoch(val_loss=0.5)
    assert trainer.saved == ["last.ckpt", "epoch=0-step=2.ckpt", "last.ckpt"]
    assert own_state(tmp_path / "last.ckpt", callback)["best_model_score"] == 0.5


def test_a_step_of_several_loader_batches_is_saved_when_all_have_ended(tmp_path):
    seen = []
    callback = ModelCheckpoint(every_n_train_steps=1)
    trainer = SteppedTrainer(tmp_path, callback, window=3)
    end = callback.on_train_batch_end

    def watched(*arguments: Any) -> None:
        end(*arguments)
        seen.append(len(trainer.saved))

    callback.on_train_batch_end = watched  # type: ignore[method-assign]
    trainer.begin()
    trainer.step()
    assert seen == [0, 0, 1]


def test_a_value_of_the_validation_is_read_after_it(tmp_path):
    # Several validations an epoch: each is judged.
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=-1, save_last=False)
    trainer = SteppedTrainer(tmp_path, callback, val_check_interval=0.5)
    trainer.begin()
    for loss in (0.5, 0.4):
        trainer.step()
        trainer.validate(val_loss=loss)
    trainer.end_epoch()
    assert [score.item() for score in callback.best_k_models.values()] == [0.5, 0.4]


def test_a_validation_at_the_end_of_the_epoch_is_judged_with_the_epoch(tmp_path):
    callback = ModelCheckpoint(monitor="train_loss", save_last=False)
    trainer = SteppedTrainer(tmp_path, callback)
    trainer.begin()
    trainer.step()
    trainer.validate(val_loss=1.0)
    assert trainer.saved == []  # the training's mean is not known yet
    trainer.end_epoch(train_loss=0.5)
    assert callback.best_model_score == 0.5


def test_an_interval_of_one_batch_is_not_one_epoch(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", save_last=False)
    trainer = SteppedTrainer(tmp_path, callback, val_check_interval=1)
    trainer.begin()
    trainer.step()
    trainer.validate(val_loss=1.0)
    assert callback.best_model_score == 1.0


def test_rare_validations_are_judged_and_the_latest_is_kept_every_epoch(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss")
    trainer = SteppedTrainer(tmp_path, callback, check_val_every_n_epoch=2)
    trainer.begin()
    trainer.step()
    trainer.end_epoch()
    trainer.step()
    trainer.validate(val_loss=0.5)
    trainer.end_epoch()
    assert trainer.saved == ["last.ckpt", "epoch=1-step=2.ckpt", "last.ckpt"]


def test_without_any_validation_rare_ones_do_not_matter(tmp_path):
    callback = ModelCheckpoint(monitor="train_loss", save_last=False)
    trainer = SteppedTrainer(tmp_path, callback, check_val_every_n_epoch=2, num_val_batches=[])
    trainer.begin()
    trainer.step()
    trainer.end_epoch(train_loss=0.5)
    assert callback.best_model_score == 0.5


def test_the_moment_of_judgement_can_be_chosen(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", save_on_train_epoch_end=True)
    trainer = SteppedTrainer(tmp_path, callback, val_check_interval=0.5)
    trainer.begin()
    trainer.step()
    trainer.validate(val_loss=0.5)
    assert trainer.saved == []
    trainer.end_epoch()
    assert callback.best_model_score == 0.5


def test_a_step_before_the_first_validation_leaves_the_judgement_to_it(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", every_n_train_steps=2)
    trainer = SteppedTrainer(tmp_path, callback, val_check_interval=3)
    trainer.begin()
    trainer.step()
    trainer.step()
    assert trainer.saved == ["last.ckpt"]
    trainer.step()
    trainer.validate(val_loss=0.5)
    assert trainer.saved == ["last.ckpt", "epoch=0-step=3.ckpt", "last.ckpt"]
    # It was one judgement, no more.
    trainer.step(val_loss=0.4)
    trainer.step()
    trainer.validate(val_loss=0.3)
    assert callback.best_model_score == 0.4


def test_a_judgement_left_open_is_still_open_after_a_resumption(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", every_n_train_steps=2)
    trainer = SteppedTrainer(tmp_path, callback, val_check_interval=3)
    trainer.begin()
    trainer.step()
    trainer.step()
    resumed = SteppedTrainer(
        tmp_path,
        ModelCheckpoint(monitor="val_loss", every_n_train_steps=2),
        val_check_interval=3,
    )
    resumed.begin(checkpoint.load(tmp_path / "last.ckpt"))
    resumed.validate(val_loss=0.5)
    assert "epoch=0-step=2.ckpt" in resumed.saved


def test_a_judgement_that_can_never_be_made_is_an_error_at_the_end_of_the_epoch(tmp_path):
    trainer = SteppedTrainer(tmp_path, ModelCheckpoint(monitor="acc", every_n_train_steps=1))
    trainer.begin()
    trainer.step()
    trainer.validate(val_loss=0.5)
    with pytest.raises(ValueError, match="needs 'acc'"):
        trainer.end_epoch()


def test_a_fit_stopped_within_an_epoch_leaves_the_state_before_its_end_hooks(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss")
    trainer = SteppedTrainer(tmp_path, callback)
    trainer.begin()
    trainer.step()
    trainer.call("on_train_interrupted")
    trainer.validate(val_loss=0.5)
    trainer.end_epoch()
    trainer.end()
    assert trainer.saved == ["last.ckpt", "epoch=0-step=1.ckpt"]
    assert own_state(tmp_path / "last.ckpt", callback)["best_k_models"] == {}


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), SystemExit(143)])
def test_an_exception_saves_the_state_and_the_end_hooks_nothing_more(tmp_path, error):
    trainer = SteppedTrainer(tmp_path, ModelCheckpoint())
    trainer.begin()
    trainer.step()
    trainer.fail(error)
    assert trainer.saved == ["last.ckpt"]
    assert checkpoint.load(tmp_path / "last.ckpt")["global_step"] == 1


def test_an_exception_saves_the_latest_also_where_it_is_not_kept_otherwise(tmp_path):
    trainer = SteppedTrainer(tmp_path, ModelCheckpoint(monitor="x", save_last=False))
    trainer.begin()
    trainer.step()
    trainer.fail(RuntimeError())
    assert trainer.saved == ["last.ckpt"]


def test_an_exception_saves_nothing_if_told_so(tmp_path):
    trainer = SteppedTrainer(tmp_path, ModelCheckpoint(save_on_exception=False))
    trainer.begin()
    trainer.step()
    trainer.fail(RuntimeError())
    assert trainer.saved == []


def test_a_state_of_this_step_that_is_saved_is_not_replaced_by_one_in_mid_step(tmp_path):
    trainer = SteppedTrainer(tmp_path, ModelCheckpoint(every_n_train_steps=1))
    trainer.begin()
    trainer.step()
    trainer.mid_step = True
    trainer.fail(RuntimeError())
    assert trainer.saved == ["last.ckpt"]


def test_a_fault_before_the_first_step_leaves_an_earlier_file_alone(tmp_path):
    first = SteppedTrainer(tmp_path, ModelCheckpoint())
    run(first, [1.0])
    second = SteppedTrainer(tmp_path, ModelCheckpoint())
    second.begin()
    second.fail(RuntimeError())
    assert second.saved == []


def test_a_fault_before_training_has_begun_saves_nothing(tmp_path):
    trainer = SteppedTrainer(tmp_path, ModelCheckpoint(), global_step=7)
    trainer.call("setup", "fit")
    trainer.exception = RuntimeError()
    trainer.call("on_exception", trainer.exception)
    assert trainer.saved == []


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filename", "insert", "expected"),
    [
        ("{epoch:02d}-{val_loss:.3f}", True, "epoch=03-val_loss=0.125.ckpt"),
        ("{epoch:02d}-{val_loss:.3f}", False, "03-0.125.ckpt"),
        ("run-{step}", True, "run-step=7.ckpt"),
        ("epoch{epoch}-loss{val/loss:.1f}", False, "epoch3-loss0.2.ckpt"),
        ("{val/loss:.1f}", True, "val_loss=0.2.ckpt"),
        ("{../../x:.0f}", True, ".._.._x=1.ckpt"),
        ("{a.b[0]}", True, "a.b_0_=2.0.ckpt"),
        ("best", True, "best.ckpt"),
    ],
)
def test_names_are_filled_in(tmp_path, filename, insert, expected):
    callback = ModelCheckpoint(
        filename=filename, auto_insert_metric_name=insert, save_last=False, dirpath=tmp_path / "in"
    )
    trainer = SteppedTrainer(tmp_path, callback, current_epoch=3, global_step=5)
    trainer.begin()
    trainer.log(**{"val/loss": 0.2, "../../x": 1.0, "a.b[0]": 2.0})
    trainer.epoch(val_loss=0.125)
    assert trainer.saved == [expected]
    assert files(tmp_path / "in") == {expected}


def test_one_name_for_the_best_is_replaced_by_a_better_one(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", filename="best", save_last=False)
    run(SteppedTrainer(tmp_path, callback), [0.5, 0.3, 0.4])
    assert files(tmp_path) == {"best.ckpt"}
    assert own_state(tmp_path / "best.ckpt", callback)["best_model_score"] == 0.3


def test_equal_names_of_the_best_do_not_overwrite_each_other(tmp_path):
    callback = ModelCheckpoint(
        monitor="val_loss", filename="{val_loss:.1f}", save_top_k=3, save_last=False
    )
    run(SteppedTrainer(tmp_path, callback), [0.52, 0.51, 0.50])
    names = ["val_loss=0.5.ckpt", "val_loss=0.5-v1.ckpt", "val_loss=0.5-v2.ckpt"]
    assert [Path(path).name for path in callback.best_k_models] == names
    assert files(tmp_path) == set(names)


def test_a_file_of_another_run_is_not_overwritten(tmp_path):
    (tmp_path / "best.ckpt").write_text("mine")
    callback = ModelCheckpoint(monitor="val_loss", filename="best", save_last=False)
    run(SteppedTrainer(tmp_path, callback), [0.5, 0.3])
    assert (tmp_path / "best.ckpt").read_text() == "mine"
    # The replaced best was best-v1, whose name is free again only when it has gone.
    assert callback.best_model_path == str(tmp_path / "best-v1.ckpt")
    assert files(tmp_path) == {"best.ckpt", "best-v1.ckpt"}


def test_a_value_in_the_name_that_is_never_logged_is_an_error(tmp_path):
    trainer = SteppedTrainer(tmp_path, ModelCheckpoint(filename="{val_los:.2f}"))
    trainer.begin()
    with pytest.raises(ValueError, match=r"needs 'val_los', .*logged are \['val_loss'\]"):
        trainer.epoch(val_loss=0.5)


def test_a_value_that_does_not_fit_its_format_is_an_error_that_names_both(tmp_path):
    trainer = SteppedTrainer(tmp_path, ModelCheckpoint(filename="{val_loss:d}"))
    trainer.begin()
    with pytest.raises(ValueError, match=r"filename='\{val_loss:d\}': val_loss = 0.5"):
        trainer.epoch(val_loss=0.5)


@pytest.mark.parametrize("filename", ["../{epoch}", "a/b", "..", "{epoch:/>9}"])
def test_a_name_never_leaves_the_folder(tmp_path, filename):
    with pytest.raises(ValueError, match="give the folder separately"):
        run(SteppedTrainer(tmp_path / "in", ModelCheckpoint(filename=filename)), [1.0])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# -- state -----------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_what_an_uninterrupted_one_keeps(tmp_path):
    losses = [0.5, 0.3, 0.4, 0.2, 0.35]

    def make(folder: str) -> SteppedTrainer:
        return SteppedTrainer(tmp_path / folder, ModelCheckpoint(monitor="val_loss", save_top_k=2))

    whole = make("whole")
    run(whole, losses)
    first = make("parts")
    first.begin()
    for loss in losses[:3]:
        first.epoch(val_loss=loss)
    second = make("parts")
    second.current_epoch = 3
    second.begin(checkpoint.load(tmp_path / "parts" / "last.ckpt"))
    for loss in losses[3:]:
        second.epoch(val_loss=loss)
    second.end()
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    (one,), (other,) = whole.callbacks, second.callbacks
    assert isinstance(one, ModelCheckpoint) and isinstance(other, ModelCheckpoint)
    assert Path(one.best_model_path).name == Path(other.best_model_path).name
    assert list(one.best_k_models.values()) == list(other.best_k_models.values())


def test_a_run_resumed_into_another_folder_deletes_nothing_in_the_first(tmp_path):
    first = SteppedTrainer(tmp_path / "a", ModelCheckpoint(monitor="val_loss"))
    run(first, [0.5])
    before = files(tmp_path / "a")
    callback = ModelCheckpoint(monitor="val_loss")
    second = SteppedTrainer(tmp_path / "b", callback, current_epoch=1)
    second.begin(checkpoint.load(tmp_path / "a" / "last.ckpt"))
    second.epoch(val_loss=0.6)
    # What is best so far is still in the first folder.
    assert callback.best_model_path == str(tmp_path / "a" / "epoch=0-step=2.ckpt")
    second.epoch(val_loss=0.3)
    second.epoch(val_loss=0.2)
    assert files(tmp_path / "a") == before
    assert callback.best_model_score == 0.2
    assert files(tmp_path / "b") == {"epoch=3-step=8.ckpt", "last.ckpt"}


def test_a_file_that_somebody_has_deleted_no_longer_counts(tmp_path):
    first = SteppedTrainer(tmp_path, ModelCheckpoint(monitor="val_loss"))
    run(first, [0.5])
    (tmp_path / "epoch=0-step=2.ckpt").unlink()
    callback = ModelCheckpoint(monitor="val_loss")
    second = SteppedTrainer(tmp_path, callback, current_epoch=1)
    second.begin(checkpoint.load(tmp_path / "last.ckpt"))
    second.epoch(val_loss=0.6)
    assert files(tmp_path) == {"epoch=1-step=4.ckpt", "last.ckpt"}


def test_a_second_fit_begins_anew(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", save_last=False)
    trainer = SteppedTrainer(tmp_path, callback)
    run(trainer, [0.1])
    run(trainer, [0.5])
    assert callback.best_model_score == 0.5


def test_a_second_fold_of_a_run_begins_anew(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", save_last=False)
    trainer = SteppedTrainer(tmp_path, callback)
    trainer.begin()
    trainer.epoch(val_loss=0.1)
    trainer.begin_fold()
    trainer.epoch(val_loss=0.5)
    assert callback.best_model_score == 0.5
    assert len(files(tmp_path)) == 2  # the best of each


def test_several_have_states_of_their_own():
    keys = {
        ModelCheckpoint().state_key,
        ModelCheckpoint(monitor="a").state_key,
        ModelCheckpoint(monitor="a", mode="max").state_key,
        ModelCheckpoint(every_n_train_steps=5).state_key,
        ModelCheckpoint(train_time_interval=5).state_key,
    }
    assert len(keys) == 5
    assert ModelCheckpoint(train_time_interval=1).state_key == (
        ModelCheckpoint(train_time_interval=timedelta(minutes=1)).state_key
    )


def test_verbose_prints_what_is_saved(tmp_path, capsys):
    run(SteppedTrainer(tmp_path, ModelCheckpoint(verbose=True)), [0.5])
    assert f"step 2: saved {tmp_path / 'last.ckpt'}" in capsys.readouterr().out


# -- in a run --------------------------------------------------------------------------------------


def test_in_a_run_files_and_the_state_in_them_agree(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", filename="{epoch}", save_top_k=2)
    trainer = fit(tmp_path, Pair(), callback, max_epochs=4)
    assert callback in trainer.callbacks and len(trainer.checkpoint_callbacks) == 1
    assert len(files(tmp_path)) == 3
    best = min(callback.best_k_models, key=lambda path: callback.best_k_models[path].item())
    assert callback.best_model_path == best
    assert own_state(best, callback)["best_model_path"] == best
    for path, score in callback.best_k_models.items():
        module = Pair()
        module.load_state_dict(checkpoint.load(path)["state_dict"])
        (found,) = trainer.validate(module, batches(), verbose=False)
        # The value by which it was judged is that of the weights in it.
        assert found["val_loss"] == pytest.approx(score.item(), rel=1e-12)


def test_in_a_run_a_fault_saves_the_last_whole_step(tmp_path):
    class Failing(Pair):
        def training_step(self, batch: Any) -> Any:
            if self.global_step == 4:
                raise ArithmeticError("oh")
            yield from super().training_step(batch)

    with pytest.raises(ArithmeticError):
        fit(tmp_path, Failing())
    state = checkpoint.load(tmp_path / "last.ckpt")
    assert (state["global_step"], state["mid_step"]) == (4, False)


def test_in_a_run_a_fault_between_two_updates_saves_a_state_that_says_so(tmp_path):
    class Failing(Pair):
        def training_step(self, batch: Any) -> Any:
            yield from super().training_step(batch)
            if self.global_step == 4:
                raise ArithmeticError("oh")

    with pytest.raises(ArithmeticError):
        fit(tmp_path / "a", Failing())
    state = checkpoint.load(tmp_path / "a" / "last.ckpt")
    assert (state["global_step"], state["mid_step"]) == (4, True)
    # Where the whole step before is saved already, that stays.
    with pytest.raises(ArithmeticError):
        fit(tmp_path / "b", Failing(), ModelCheckpoint(every_n_train_steps=2))
    state = checkpoint.load(tmp_path / "b" / "last.ckpt")
    assert (state["global_step"], state["mid_step"]) == (4, False)


@pytest.mark.parametrize("steps", [4, 6, 8])
def test_in_a_run_stopped_and_resumed_the_best_are_the_same(tmp_path, steps):
    def callback() -> ModelCheckpoint:
        return ModelCheckpoint(monitor="val_loss", save_top_k=2, every_n_train_steps=3)

    whole, resumed = callback(), callback()
    fit(tmp_path / "whole", Pair(), whole, max_epochs=3)
    # The last word of the first run, in mid-epoch, is none that a run in one piece would have said.
    fit(tmp_path / "parts", Pair(), callback(), max_epochs=3, max_steps=steps)
    fit(tmp_path / "parts", Pair(), resumed, max_epochs=3, ckpt_path="last")
    assert list(whole.best_k_models.values()) == list(resumed.best_k_models.values())
    assert whole.best_model_score == resumed.best_model_score
    assert Path(whole.best_model_path).name == Path(resumed.best_model_path).name


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mode": "lower"}, ValueError, "mode must be 'min'.* got 'lower'"),
        ({"monitor": 3}, TypeError, "monitor must be the name"),
        ({"save_top_k": -2, "monitor": "x"}, ValueError, "save_top_k must be at least -1"),
        ({"save_top_k": 1.5}, TypeError, "save_top_k must be a whole number"),
        ({"save_top_k": 3}, ValueError, "save_top_k=3 needs monitor="),
        ({"save_last": "link"}, TypeError, "save_last must be True or False, got 'link'"),
        ({"every_n_train_steps": 0}, ValueError, "every_n_train_steps must be at least 1"),
        ({"every_n_epochs": True}, TypeError, "every_n_epochs must be a whole number"),
        ({"train_time_interval": "1h"}, TypeError, "a timedelta, or minutes"),
        ({"train_time_interval": -1}, ValueError, "must not be negative"),
        ({"filename": "{epoch"}, ValueError, "is no template"),
        ({"filename": "{}"}, ValueError, "a field without a name"),
        ({"filename": "{0}"}, ValueError, "a field without a name"),
        ({"filename": "last"}, ValueError, "last.ckpt is the file of the latest state"),
        ({"filename": "{epoch}.ckpt"}, ValueError, "leave .ckpt out"),
        ({"filename": 3}, TypeError, "filename must be a str"),
        ({"filename": "../{epoch}"}, ValueError, "give the folder separately"),
    ],
)
def test_wrong_arguments_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        ModelCheckpoint(**settings)


@pytest.mark.parametrize("name", ["../precious.ckpt", "precious.txt"])
def test_a_path_in_a_checkpoint_deletes_nothing_but_checkpoints_of_its_folder(tmp_path, name):
    folder = tmp_path / "runs"
    folder.mkdir()
    victim = folder / name
    victim.write_text("precious")
    callback = ModelCheckpoint(dirpath=folder, save_last=False)
    trainer = SteppedTrainer(tmp_path, callback)
    trainer.begin()
    trainer.epoch()
    (first,) = [file for file in files(folder) if file.endswith(".ckpt")]
    callback.load_state_dict({**callback.state_dict(), "best_model_path": str(victim)})
    trainer.epoch()
    assert victim.read_text() == "precious"
    trainer.epoch()  # its own are deleted still
    assert len([file for file in files(folder) if file.endswith(".ckpt")]) == 2
    assert first in files(folder)
