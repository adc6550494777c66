"""Write `lightning.json`: what every file of `idioms/` gives under Lightning itself.

`lightning_names.json` gets the public names that Lightning's users write.

    python tests/porting/record.py            # all of them
    python tests/porting/record.py plateau    # these, the others as they were

It needs `lightning==2.6.6`, torchmetrics, and a torch of the version that the tests run with.
"""

import importlib
import importlib.util
import inspect
import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FILE = HERE / "lightning.json"
NAMES = HERE / "lightning_names.json"


def numbers(path: Path) -> dict[str, float]:
    """What a file's `main` returns, run in an empty folder."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            found: dict[str, float] = module.main()
        finally:
            os.chdir(before)
    return found


def public(kind: type, base: type) -> list[str]:
    """The public names of a class that a base class has not."""
    return sorted(name for name in set(dir(kind)) - set(dir(base)) if not name.startswith("_"))


def arguments(function: object) -> list[str]:
    """The names of a function's arguments, in their order."""
    named = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    given = [one.name for one in named if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    return [name for name in given if name not in ("self", "cls")]


def names() -> dict[str, list[str]]:
    """What a script may write, by the class that it belongs to."""
    lightning = importlib.import_module("lightning")
    nn = importlib.import_module("torch.nn")
    return {
        "LightningModule": public(lightning.LightningModule, nn.Module),
        "LightningDataModule": public(lightning.LightningDataModule, object),
        "Callback": public(lightning.Callback, object),
        "Trainer": public(lightning.Trainer, object),
        "callbacks": sorted(lightning.pytorch.callbacks.__all__),
        "loggers": sorted(lightning.pytorch.loggers.__all__),
        "Trainer()": arguments(lightning.Trainer),
        **{
            f"LightningModule.{name}()": arguments(getattr(lightning.LightningModule, name))
            for name in ("log", "load_from_checkpoint", "save_hyperparameters")
        },
        **{
            f"Trainer.{name}()": arguments(getattr(lightning.Trainer, name))
            for name in ("fit", "validate", "test", "predict", "save_checkpoint")
        },
        **{
            f"{name}()": arguments(getattr(lightning.pytorch.callbacks, name))
            for name in ("EarlyStopping", "ModelCheckpoint", "LearningRateMonitor")
        },
    }


if __name__ == "__main__":
    recorded = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for path in sorted((HERE / "idioms").glob("*.py")):
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            recorded[path.stem] = numbers(path)
    NAMES.write_text(json.dumps(names(), indent=1) + "\n", encoding="utf-8")
    FILE.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
