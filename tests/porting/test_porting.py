"""Scripts written for Lightning run here with their imports changed, and give the same numbers.

`idioms/` holds them as they run under Lightning, and `lightning.json` what they gave there (see
`record.py`): the same initial weights and the same order of samples, so the same losses.
"""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
IDIOMS = sorted((HERE / "idioms").glob("*.py"))
RECORDED = json.loads((HERE / "lightning.json").read_text(encoding="utf-8"))

#: All that changes.
IMPORTS = {
    "import pytorch_lightning as pl": "import composefit.lightning as pl",
    "from lightning import": "from composefit.lightning import",
    "from lightning.pytorch import": "from composefit.lightning import",
    "import lightning as L": "import composefit.lightning as L",
    "import lightning.pytorch as pl": "import composefit.lightning as pl",
    "from lightning.pytorch.callbacks import": "from composefit.callbacks import",
    "from lightning.pytorch.loggers import": "from composefit.loggers import",
    "from lightning.pytorch.utilities import": "from composefit.lightning import",
}


def ported(source: str) -> str:
    """A script with its imports changed."""
    for old, new in IMPORTS.items():
        source = re.sub(rf"^{re.escape(old)}(?= |$)", new, source, flags=re.MULTILINE)
    return source


@pytest.mark.parametrize("file", IDIOMS, ids=lambda file: file.stem)
def test_script_for_lightning_gives_the_same_numbers(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType(file.stem)
    monkeypatch.setitem(sys.modules, file.stem, module)  # for what looks names up by `__module__`
    exec(compile(ported(file.read_text(encoding="utf-8")), file, "exec"), vars(module))
    found, expected = module.main(), RECORDED[file.stem]
    assert set(found) == set(expected)
    different = {
        name: (found[name], value)
        for name, value in expected.items()
        if found[name] != pytest.approx(value, rel=1e-6, abs=1e-7)
    }
    assert different == {}


def test_every_script_has_numbers_of_lightning() -> None:
    assert len(IDIOMS) >= 22
    assert {file.stem for file in IDIOMS} == set(RECORDED)


@pytest.mark.parametrize("file", IDIOMS, ids=lambda file: file.stem)
def test_script_mentions_lightning_in_its_imports_only(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert re.search(r"lightning\b", source)
    rest = ported(source).replace("composefit.lightning", "")
    assert re.search(r"lightning\b", rest) is None


def test_page_lists_the_imports_that_change() -> None:
    page = (HERE.parents[1] / "docs" / "from-lightning.md").read_text(encoding="utf-8")
    for old, new in IMPORTS.items():
        assert f"| `{old}" in page
        assert f"`{new}" in page
