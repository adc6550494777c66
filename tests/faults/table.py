"""The table of `docs/reliability.md`: what the tests of each fault say happens.

`python -m tests.faults.table` runs the tests in this folder and writes the page. Otherwise each
test that fills a row compares it with the page, so that the page cannot fall behind.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple, TypeAlias

import pytest

from tests.faults.fault import Surfaced

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "reliability.md"
PLUGIN = "table-of-faults"
COMMAND = "`python -m tests.faults.table`"

#: What a row is made of: text, or an error, of which type and message are shown.
Part: TypeAlias = str | BaseException | Surfaced


class Entry(NamedTuple):
    """A fault, and what was seen elsewhere."""

    fault: str
    elsewhere: str = ""


# As the page explains them.
SILENT = "silent"
RAW = "raw"

ENTRIES: dict[str, dict[str, Entry]] = {
    "Configuration": {
        "1": Entry("an unknown argument"),
        "2": Entry("an unknown strategy or precision"),
        "3": Entry(
            '`accumulate_grad_batches=0`, `gradient_clip_val=-1`, `max_epochs="3"`',
            f"{SILENT}, {SILENT}, {RAW}",
        ),
        "4": Entry("a callback that is none", RAW),
        "5": Entry("no `training_step`, `configure_optimizers` or `validation_step`"),
        "6": Entry("`super().__init__()` is missing", RAW),
        "7": Entry("a parameter twice in one optimizer"),
        "8": Entry("a trainable parameter in no optimizer", SILENT),
        "9": Entry("a `monitor` that is never logged", "a warning"),
    },
    "Data": {
        "10": Entry("an empty loader", "a warning"),
        "11": Entry(
            "a generator for several epochs; an iterable that is empty in the second", SILENT
        ),
        "12": Entry("a batch smaller than the number of shards; a shard of one sample"),
        "13": Entry(
            "a ragged last batch, or accumulation window", f"{SILENT}: divides by a constant"
        ),
        "14": Entry("text, numbers, None and lists in a batch"),
        "15": Entry(
            "batches of other types: named tuples, dataclasses, mappings, types of one's own"
        ),
        "16": Entry("tensors of a batch that disagree on the number of samples"),
        "16b": Entry("a list `[x, y]` of as many tensors as the batch has samples"),
        "17": Entry("the dataset raises", RAW),
        "18": Entry("a loader's worker is killed, or hangs"),
    },
    "Meaning": {
        "19": Entry("a loss that is no scalar", RAW),
        "20": Entry(
            "a loss that does not depend on its optimizer's parameters", f"{RAW}, or {SILENT}"
        ),
        "21": Entry("a number, text or an unknown optimizer's name for a loss"),
        "22": Entry("NaN or infinity", f"{SILENT}: ends with weights of NaN"),
        "23": Entry("an optimizer that is never updated", SILENT),
        "24": Entry("steps that update nothing; a helper called without `yield from`"),
        "25": Entry("shards that disagree"),
        "26": Entry("`StopIteration` in a step", f"{SILENT}: training ends"),
        "27": Entry("an exception in one shard, between two updates"),
        "28": Entry("attributes set, buffers written in a step of several shards"),
        "28b": Entry(
            "a loss that is a mean over something else than samples",
            f"{SILENT}, in every trainer: gradients are off by 12 to 70 %",
        ),
        "28c": Entry("a mode left open across a `yield`"),
    },
    "Checkpoints": {
        "29": Entry(
            "`kill -9` while a checkpoint is overwritten",
            "of 20 kills, the file was lost in: Lightning 0, or 6 where the temporary folder is on "
            "another file system; `torch.save` in place 10 of 10; DCP with one id 6 of 6; "
            "Accelerate 5 of 8",
        ),
        "30": Entry("a checkpoint that was cut short, or is empty", RAW),
        "31": Entry("a flipped bit", f"{SILENT}, in `torch.load` and safetensors, too"),
        "32": Entry("a checkpoint of another module"),
        "33": Entry("a bare `state_dict` for a checkpoint", RAW),
        "34": Entry("another class or number of optimizers", RAW),
        "35": Entry("another number of processes"),
        "36": Entry(
            "a read-only folder; a full disk",
            f"{SILENT}: reports success; on a full disk the good file is destroyed where the "
            "temporary folder is on another file system",
        ),
        "37": Entry('`ckpt_path="last"`, and there is none'),
        "38": Entry(
            "resumed in mid-epoch, shuffled",
            f"{SILENT}: of 64 samples 24 come twice and 24 never; weights are off by 0.09",
        ),
        "39": Entry(
            "hyperparameters that a safe load cannot read", "an error, but when it is loaded"
        ),
    },
    "Security": {
        "40": Entry(
            "a checkpoint that carries code",
            "runs it: `load_from_checkpoint` from a URL, DCP's `.metadata`, Accelerate's "
            "`custom_checkpoint_0.pkl`",
        ),
        "41": Entry("a name such as `../../x`", f"{SILENT}: writes outside of the folder"),
        "42": Entry("formulas and HTML in the names of metrics", SILENT),
        "43": Entry("a release of torch whose `weights_only=True` runs code"),
    },
    "Signals and memory": {
        "44": Entry("SIGTERM, SIGUSR1", f"{SILENT}: exit code 0, and nothing is saved"),
        "45": Entry("Ctrl-C", "nothing is saved"),
        "46": Entry("memory runs out", RAW),
    },
    "Processes": {
        "47": Entry("a rank raises, is killed, or exits"),
        "48": Entry("a rank hangs, or skips an update", "ends after 1800 s, and a process stays"),
        "49": Entry("other numbers of batches or samples on each rank", "hangs"),
    },
}

HEAD = (
    "# Reliability\n\n"
    "What goes wrong in trainings, and what happens then. Each row is what a test in "
    "`tests/faults/` has seen, the messages word for word, `…` where they are shortened or differ "
    "from run to run; the tests of entry 7 are those whose names begin with `test_f7_`. [The "
    "benchmarks](../benchmarks/README.md) have what takes more than a test to see: kills, "
    "resumptions and damaged files by the dozen.\n\n"
    "Whatever the row, three things hold: nothing goes wrong in silence, the state afterwards is "
    "that of the last completed update, and the same trainer can be used again.\n\n"
    "The last column has what was measured elsewhere, with Lightning 2.6.6 and torch 2.13 on a "
    "CPU, unless it names another, and is empty where nothing was. *Silent* is a fault that ends "
    "in wrong results or lost state without a word, *raw* an error of the code beneath, which "
    "names neither cause nor cure.\n"
)


def number_of(test: str) -> str:
    """The entry that a test is about: `test_f16b_...` is about 16b."""
    found = re.match(r"test_f(\d+[a-z]?)_", test)
    assert found is not None, f"{test} is not named after a fault"
    return found[1]


# -- a row -------------------------------------------------------------------------------------


def told(*parts: Part) -> str:
    """A cell of the table, the same in every run."""
    return " ".join(part if isinstance(part, str) else _raised(part) for part in parts)


def message(text: str, most: int = 320) -> str:
    """A message as code, shortened, without what differs from run to run."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"(?<![\w.])(/[^\s/:'\"(),]+)+/(?=[^\s/:'\"(),])", "…/", text)
    text = re.sub(r"\.py:\d+", ".py:…", text)
    text = re.sub(r"\b(pid) \d+", r"\1 …", text)
    text = re.sub(r"\b\d+ bytes", "… bytes", text)
    text = re.sub(r"\.[0-9a-f]{16}\.tmp", ".….tmp", text)
    if len(text) > most:
        text = text[:most].rsplit(" ", 1)[0] + " …"
    mark = "``" if "`" in text else "`"
    inner = f" {text} " if mark == "``" else text
    return f"{mark}{inner}{mark}".replace("|", r"\|")


def _raised(found: BaseException | Surfaced) -> str:
    error = found.error if isinstance(found, Surfaced) else found
    return message(f"{type(error).__name__}: {error}")


# -- the page ----------------------------------------------------------------------------------


def page(happens: dict[str, str]) -> str:
    """The page, with what happens in each entry."""
    parts = [HEAD]
    for title, entries in ENTRIES.items():
        parts.append(f"## {title}\n\n| | what goes wrong | what happens here | elsewhere |")
        parts.append("|---|---|---|---|")
        for number, entry in entries.items():
            parts.append(f"| {number} | {entry.fault} | {happens[number]} | {entry.elsewhere} |")
        parts.append("")
    return "\n".join(parts)


def written() -> str:
    """The page as it is."""
    return PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""


def rows(text: str) -> dict[str, tuple[str, str, str]]:
    """Number -> the three other cells of its row."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and re.fullmatch(r"\d+[a-z]?", cells[0]):
            found[cells[0]] = (cells[1], cells[2], cells[3])
    return found


class Collector:
    """A plugin of pytest that takes what the tests tell."""

    def __init__(self) -> None:
        self.found: dict[str, set[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for key, text in report.user_properties:
            if key == PLUGIN and report.when == "call":
                number = number_of(report.nodeid.rpartition("::")[2])
                self.found.setdefault(number, set()).add(str(text))


class Plugins:
    """Puts the collector where `conftest.py` sees it."""

    def __init__(self, collector: Collector) -> None:
        self.collector = collector

    def pytest_configure(self, config: pytest.Config) -> None:
        config.pluginmanager.register(self.collector, PLUGIN)


def main() -> int:
    """Run the tests and write the page, if all of them pass."""
    collector = Collector()
    status = pytest.main(
        ["-q", "-p", "no:cacheprovider", "-k", "not page", str(FOLDER)], [Plugins(collector)]
    )
    if status:
        return int(status)
    several = {number: texts for number, texts in collector.found.items() if len(texts) > 1}
    if several:
        print(f"entries with more than one row: {several}", file=sys.stderr)
        return 1
    PAGE.write_text(
        page({number: texts.pop() for number, texts in collector.found.items()}), encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
