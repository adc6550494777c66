"""Where the loaders of a run come from: the call, a data module, or the module itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composefit.data.loaders import one_after_another
from composefit.datamodule import DataModule
from composefit.module import LoopModule


class Sources:
    """Gives the loaders of a stage (`"train"`, `"val"`, `"test"`, `"predict"`).

    Args:
        module: asked where there is neither a loader in the call nor a data module.
        datamodule: asked in its place, where there is one.
        given: stage -> what the user passed.
    """

    def __init__(
        self, module: LoopModule, datamodule: DataModule | None, given: Mapping[str, Any]
    ) -> None:
        self.module = module
        self.datamodule = datamodule
        self.given = given

    @classmethod
    def of(cls, module: LoopModule, datamodule: object, **given: Any) -> Sources:
        """Read what the user passed; a data module may stand in a loader's place.

        Raises:
            TypeError: `datamodule` is none, or is given beside loaders.
        """
        for stage, value in given.items():
            if isinstance(value, DataModule):
                if datamodule is not None:
                    raise TypeError("two data modules were given: give one, as datamodule=...")
                datamodule, given = value, {**given, stage: None}
        if datamodule is not None and not isinstance(datamodule, DataModule):
            raise TypeError(
                f"datamodule must be a composefit.DataModule, got {type(datamodule).__name__}"
            )
        if datamodule is not None:
            _refuse_transfers(datamodule)
        if datamodule is not None and any(value is not None for value in given.values()):
            raise TypeError("loaders and a data module were given: give one of the two")
        return cls(module, datamodule, given)

    def has(self, stage: str) -> bool:
        """Whether there is a loader for this stage."""
        return self.given.get(stage) is not None or self._method(stage) is not None

    @property
    def given_directly(self) -> bool:
        """Whether all loaders came with the call."""
        missing = (stage for stage, value in self.given.items() if value is None)
        return not any(map(self._method, missing))

    def refuse(self, stage: str, run: str) -> None:
        """Raise a TypeError where a run has no loader."""
        if not self.has(stage):
            raise TypeError(
                f"trainer.{run} needs a loader: pass one, or a DataModule, or define "
                f"{stage}_dataloader(self) in {type(self.module).__name__}"
            )

    def loader(self, stage: str) -> Any:
        """What stands for the loaders of this stage; a method is called anew each time."""
        given = self.given.get(stage)
        if given is not None:
            return given
        method = self._method(stage)
        return None if method is None else method()

    def loaders(self, stage: str) -> list[Any]:
        """Each loader of an evaluation, which run one after another."""
        return one_after_another(self.loader(stage))

    def _method(self, stage: str) -> Any:
        name = f"{stage}_dataloader"
        owner: LoopModule | DataModule = self.module
        base: type[LoopModule | DataModule] = LoopModule
        if self.datamodule is not None:
            owner, base = self.datamodule, DataModule
        if getattr(type(owner), name) is getattr(base, name) and name not in vars(owner):
            return None
        return getattr(owner, name)


def _refuse_transfers(datamodule: DataModule) -> None:
    """Refuse Lightning's hooks around the transfer of a batch, which nobody would call."""
    for name in ("transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer"):
        if hasattr(datamodule, name):
            raise TypeError(
                f"{type(datamodule).__name__}.{name} is no hook that is called: do it in the "
                "data loader, or in the step"
            )
