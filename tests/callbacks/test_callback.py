import inspect

import pytest

from composefit.callbacks import Callback, ModelCheckpoint, ModelSummary, ProgressBar

SIGNATURES = {
    "log": "name value options",
    "log_dict": "dictionary options",
    "setup": "trainer module stage",
    "on_exception": "trainer module exception",
    "teardown": "trainer module stage",
    "on_fit_start": "trainer module",
    "on_sanity_check_start": "trainer module",
    "on_sanity_check_end": "trainer module",
    "on_train_start": "trainer module",
    "on_train_epoch_start": "trainer module",
    "on_train_batch_start": "trainer module batch batch_idx",
    "on_before_optimizer_step": "trainer module optimizer name",
    "on_before_zero_grad": "trainer module optimizer",
    "on_after_optimizer_step": "trainer module optimizer name",
    "on_train_batch_end": "trainer module outputs batch batch_idx",
    "on_train_interrupted": "trainer module",
    "on_train_epoch_end": "trainer module",
    "on_train_end": "trainer module",
    "on_fit_end": "trainer module",
    "on_validation_start": "trainer module",
    "on_validation_epoch_start": "trainer module",
    "on_validation_batch_start": "trainer module batch batch_idx dataloader_idx",
    "on_validation_batch_end": "trainer module outputs batch batch_idx dataloader_idx",
    "on_validation_epoch_end": "trainer module",
    "on_validation_end": "trainer module",
    "on_test_start": "trainer module",
    "on_test_epoch_start": "trainer module",
    "on_test_batch_start": "trainer module batch batch_idx dataloader_idx",
    "on_test_batch_end": "trainer module outputs batch batch_idx dataloader_idx",
    "on_test_epoch_end": "trainer module",
    "on_test_end": "trainer module",
    "on_predict_start": "trainer module",
    "on_predict_epoch_start": "trainer module",
    "on_predict_batch_start": "trainer module batch batch_idx dataloader_idx",
    "on_predict_batch_end": "trainer module outputs batch batch_idx dataloader_idx",
    "on_predict_epoch_end": "trainer module",
    "on_predict_end": "trainer module",
    "state_dict": "",
    "load_state_dict": "state_dict",
    "on_save_checkpoint": "trainer module checkpoint",
    "on_load_checkpoint": "trainer module checkpoint",
}


def public_methods(cls: type) -> dict[str, str]:
    return {
        name: " ".join(list(inspect.signature(method).parameters)[1:])
        for name, method in vars(cls).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }


def test_hooks_have_these_names_and_arguments_in_the_order_in_which_they_run():
    assert list(public_methods(Callback).items()) == list(SIGNATURES.items())


@pytest.mark.parametrize("cls", [ModelCheckpoint, ModelSummary, ProgressBar])
def test_built_in_callbacks_override_existing_hooks_only(cls):
    # A misspelt hook would never be called, without a word.
    assert set(public_methods(cls)) <= set(SIGNATURES)


def test_no_hook_of_the_base_class_does_anything():
    callback = Callback()
    for name, arguments in SIGNATURES.items():
        if name.startswith("log"):
            continue
        result = getattr(callback, name)(*(None for _ in arguments.split()))
        assert result == ({} if name == "state_dict" else None)
    assert vars(callback) == {}
