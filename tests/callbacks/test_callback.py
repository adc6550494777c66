import inspect

import pytest

from composefit.callbacks import Callback, LastCheckpoint, ModelSummary, ProgressBar

SIGNATURES = {
    "setup": "trainer module stage",
    "on_fit_start": "trainer module",
    "on_train_start": "trainer module",
    "on_train_epoch_start": "trainer module",
    "on_train_batch_start": "trainer module batch batch_idx",
    "on_before_optimizer_step": "trainer module optimizer name",
    "on_after_optimizer_step": "trainer module optimizer name",
    "on_train_batch_end": "trainer module outputs batch batch_idx",
    "on_validation_start": "trainer module",
    "on_validation_epoch_start": "trainer module",
    "on_validation_batch_start": "trainer module batch batch_idx dataloader_idx",
    "on_validation_batch_end": "trainer module outputs batch batch_idx dataloader_idx",
    "on_validation_epoch_end": "trainer module",
    "on_validation_end": "trainer module",
    "on_train_epoch_end": "trainer module",
    "on_train_end": "trainer module",
    "on_fit_end": "trainer module",
    "on_exception": "trainer module exception",
    "teardown": "trainer module stage",
    "state_dict": "",
    "load_state_dict": "state_dict",
}


def public_methods(cls: type) -> dict[str, str]:
    return {
        name: " ".join(list(inspect.signature(method).parameters)[1:])
        for name, method in vars(cls).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }


def test_hooks_have_these_names_and_arguments_in_the_order_in_which_they_run():
    assert list(public_methods(Callback).items()) == list(SIGNATURES.items())


@pytest.mark.parametrize("cls", [LastCheckpoint, ModelSummary, ProgressBar])
def test_built_in_callbacks_override_existing_hooks_only(cls):
    # A misspelt hook would never be called, without a word.
    assert public_methods(cls).items() <= SIGNATURES.items()


def test_no_hook_of_the_base_class_does_anything():
    callback = Callback()
    for name, arguments in SIGNATURES.items():
        result = getattr(callback, name)(*(None for _ in arguments.split()))
        assert result == ({} if name == "state_dict" else None)
    assert vars(callback) == {}
