"""What is deliberately different from Lightning raises, and says what to write instead."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import composefit.lightning as L


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return None

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader[Any]:
    x = torch.linspace(-1, 1, 16).reshape(8, 2)
    return DataLoader(TensorDataset(x, x[:, :1]), batch_size=4)


def trainer(**arguments: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def fit(module: L.LightningModule, **arguments: Any) -> None:
    trainer(**arguments).fit(module, loader(), loader())


# -- manual optimization -----------------------------------------------------------------------


def test_manual_optimization_names_the_yield() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(RuntimeError, match="yield"):
        Manual()


def test_manual_optimization_as_a_property_names_the_yield() -> None:
    class Manual(Net):
        @property
        def automatic_optimization(self) -> bool:
            return False

    with pytest.raises((RuntimeError, TypeError), match="yield"):
        fit(Manual())


@pytest.mark.parametrize(
    "call",
    [
        lambda self: self.optimizers(),
        lambda self: self.manual_backward(torch.zeros(())),
        lambda self: self.toggle_optimizer(None),
        lambda self: self.untoggle_optimizer(None),
        lambda self: self.toggled_optimizer(None),
    ],
)
def test_calls_of_manual_optimization_name_the_yield(call: Callable[[Any], Any]) -> None:
    class Manual(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            call(self)

    with pytest.raises(RuntimeError, match="yield"):
        fit(Manual())


def test_who_reads_a_learning_rate_is_told_where_it_is() -> None:
    class Reading(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("lr", self.optimizers().param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match=r"trainer\.optimizers\["):
        fit(Reading())


def test_an_optimizer_by_its_index_is_told_of_names() -> None:
    own = trainer()
    own.fit(Net(), loader())
    with pytest.raises((KeyError, TypeError), match="optimizer"):
        own.optimizers[0]  # type: ignore[index]


def test_a_step_with_an_optimizer_idx_is_told_of_names() -> None:
    class Old(Net):
        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
            return super().training_step(batch, batch_idx)

    with pytest.raises(TypeError, match="optimizer_idx"):
        fit(Old())


# -- hooks that nobody calls -------------------------------------------------------------------

UNCALLED = {
    "on_before_backward": "on_before_optimizer_step",
    "backward": "yield",
    "optimizer_zero_grad": "leave it out",
    "transfer_batch_to_device": "loader",
    "on_before_batch_transfer": "loader",
    "on_after_batch_transfer": "loader",
    "configure_sharded_model": "configure_model",
    "on_validation_model_eval": "on_validation_start",
    "on_validation_model_train": "on_validation_end",
    "on_validation_model_zero_grad": "leave it out",
    "on_test_model_eval": "on_test_start",
    "on_test_model_train": "on_test_end",
    "on_predict_model_eval": "on_predict_start",
    "training_step_end": "Gather",
    "training_epoch_end": "on_train_epoch_end",
    "validation_epoch_end": "on_validation_epoch_end",
    "test_epoch_end": "on_test_epoch_end",
}


@pytest.mark.parametrize("name", UNCALLED)
def test_a_hook_that_is_not_called_names_its_equivalent(name: str) -> None:
    module = type("Hooked", (Net,), {name: lambda self, *args: None})()
    with pytest.raises(TypeError, match=rf"{name}.*{re.escape(UNCALLED[name])}"):
        fit(module)


@pytest.mark.parametrize(
    "name", ["transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer"]
)
def test_a_transfer_hook_of_a_data_module_names_its_equivalent(name: str) -> None:
    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

    data = type("Hooked", (Data,), {name: lambda self, *args: None})()
    with pytest.raises(TypeError, match=rf"{name}.*loader"):
        trainer().fit(Net(), datamodule=data)


def test_a_hook_of_a_callback_that_is_not_called_names_its_equivalent() -> None:
    class Before(L.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None: ...

    with pytest.raises(TypeError, match=r"on_before_backward.*on_before_optimizer_step"):
        fit(Net(), callbacks=[Before()])


def test_a_hook_of_a_callback_with_a_slip_in_its_name_names_the_nearest() -> None:
    class Slip(L.Callback):
        def on_val_end(self, trainer: Any, pl_module: Any) -> None: ...

    with pytest.raises(TypeError, match=r"on_val_end.*on_validation_end"):
        fit(Net(), callbacks=[Slip()])


# -- the trainer -------------------------------------------------------------------------------

ARGUMENTS = {
    "plugins": (["MixedPrecision"], "Strategy"),
    "sync_batchnorm": (True, "shard"),
    "use_distributed_sampler": (False, "batch"),
    "barebones": (True, "enable_"),
    "num_nodes": (2, "process"),
    "enable_autolog_hparams": (False, "save_hyperparameters"),
    "model_registry": ("name", "ckpt_path"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_lightnings_trainer_that_is_none_here_names_its_equivalent(
    name: str,
) -> None:
    value, instead = ARGUMENTS[name]
    with pytest.raises((TypeError, ValueError), match=rf"{name}.*{instead}"):
        trainer(**{name: value})


def test_several_training_loaders_in_a_list_are_told_of_the_dict() -> None:
    with pytest.raises(TypeError, match=r'\{"name": loader, \.\.\.\}'):
        trainer().fit(Net(), [loader(), loader()])


def test_fabric_names_what_hand_written_loops_use() -> None:
    with pytest.raises(AttributeError, match=r"trainer\.step.*DataParallel"):
        _ = L.Fabric


def test_a_name_that_lightning_has_not_either_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Trianer'"):
        _ = L.Trianer


# -- the names ---------------------------------------------------------------------------------


def test_names_of_lightning_are_other_names_for_this_packages_own() -> None:
    import composefit
    from composefit import callbacks, loggers
    from composefit.datamodule import DataModule

    assert L.LightningModule is composefit.LoopModule
    assert L.LightningDataModule is DataModule
    assert L.Trainer is composefit.Trainer
    assert L.Callback is composefit.Callback
    assert L.pytorch.callbacks is L.callbacks is callbacks
    assert L.pytorch.loggers is L.loggers is loggers


def test_rank_zero_only_runs_without_a_trainer() -> None:
    assert L.rank_zero_only(lambda: 7)() == 7
