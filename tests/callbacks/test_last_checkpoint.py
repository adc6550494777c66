from pathlib import Path

from composefit.callbacks import LastCheckpoint


def test_last_checkpoint_is_saved_after_each_epoch_and_after_fit(make_trainer, tmp_path):
    trainer = make_trainer(default_root_dir=str(tmp_path))
    callback = LastCheckpoint()
    for _ in range(2):
        callback.on_train_epoch_start(trainer, None)
        callback.on_train_epoch_end(trainer, None)
    callback.on_train_end(trainer, None)
    callback.on_fit_end(trainer, None)
    assert trainer.saved == [tmp_path / "last.ckpt"] * 3
    assert all(isinstance(path, Path) for path in trainer.saved)


def test_every_rank_takes_part_in_saving(make_trainer, tmp_path):
    trainer = make_trainer(default_root_dir=tmp_path, is_global_zero=False)
    LastCheckpoint().on_train_epoch_end(trainer, None)
    assert len(trainer.saved) == 1


def test_nothing_is_saved_after_an_exception(make_trainer):
    trainer = make_trainer()
    callback = LastCheckpoint()
    callback.on_exception(trainer, None, RuntimeError())
    callback.teardown(trainer, None, "fit")
    assert trainer.saved == []
