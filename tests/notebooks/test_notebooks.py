"""In a notebook: stop a cell, run it again, and nothing is left behind in between."""

import re
from pathlib import Path

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from tests.notebooks.kernel import (
    Notebook,
    Output,
    displayed,
    in_notebook,
    printed,
    raised,
)

pytestmark = pytest.mark.slow  # each starts a kernel

DEFINITIONS = """
import signal, sys, threading, time
from pathlib import Path
import rich, torch
from torch import nn
from torch.utils.data import DataLoader
from composefit import LoopModule, ThreadDataParallel, Trainer

torch.set_num_threads(1)

class GAN(LoopModule):
    stop = None

    def __init__(self):
        super().__init__()
        self.generator, self.critic = nn.Linear(2, 2), nn.Linear(2, 1)

    def configure_optimizers(self):
        return {
            name: torch.optim.Adam(part.parameters(), lr=0.01)
            for name, part in self.named_children()
        }

    def training_step(self, real):
        fake = self.generator(self.random.normal(len(real), 2))
        yield {"critic": self.critic(fake).mean() - self.critic(real).mean()}
        if self.global_step == self.stop:
            Path("here").touch()
            while not trainer.interrupted:
                time.sleep(0.01)
        yield {"generator": -self.critic(nn.functional.dropout(fake)).mean()}

    def validation_step(self, real):
        self.log("distance", self.generator(real).mean(), prog_bar=True)

data = DataLoader(torch.arange(160.0).view(80, 2), batch_size=8, shuffle=True, num_workers=1)

def make(folder):
    torch.manual_seed(0)
    strategy = ThreadDataParallel(threads=2)
    return GAN(), Trainer(strategy=strategy, max_epochs=3, seed=0, default_root_dir=folder)

def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()

def traces():
    console = rich.get_console()
    return [
        sorted(str(thread.name) for thread in threading.enumerate()),
        str([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]),
        type(sys.stdout).__name__,
        type(sys.stderr).__name__,
        len(getattr(console, "_live_stack", [])) + len(console._render_hooks),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    ]

before = traces()
"""
FIT = "trainer.fit(module, data, data)"


def bars(outputs: list[Output]) -> list[str]:
    """The bars that a cell shows in the end, each with one space for several."""
    return [re.sub(r"[━╸╺\s]+", " ", one["text/plain"]) for one in displayed(outputs)]


def test_a_stopped_cell_runs_again_and_goes_on_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async def test(notebook: Notebook) -> None:
        async def tell(expression: str) -> str:
            return printed(await notebook.run(f"print({expression})")).strip()

        assert raised(await notebook.run(DEFINITIONS)) == []
        assert raised(await notebook.run("module, trainer = make('whole')\n" + FIT)) == []
        await notebook.run("expected = weights(module)")
        assert await tell("traces() == before") == "True"

        # The stop button, in the middle of a step, which goes on to its end.
        await notebook.run("module, trainer = make('stopped'); module.stop = 14")
        stopped = await notebook.run(FIT, interrupt_at="here")
        assert raised(stopped) == ["KeyboardInterrupt"]
        (bar,) = bars(stopped)
        assert re.match(r"epoch 2/3 5/10 ", bar)
        assert await tell("trainer.global_step, traces() == before") == "15 True"

        # The same trainer goes on, as if it had not been stopped.
        await notebook.run("module.stop = None")
        resumed = await notebook.run(FIT.replace(")", ", ckpt_path='last')"))
        assert raised(resumed) == []
        (bar,) = bars(resumed)
        assert re.match(r"epoch 3/3 10/10 [\d,.]+ samples/s in 0:\d\d critic \S+ generator ", bar)
        assert await tell("trainer.global_step, weights(module) == expected") == "30 True"

        # The cell once more begins anew, and shows what it showed before.
        again = await notebook.run(FIT)
        assert raised(again) == []
        assert await tell("trainer.global_step, traces() == before") == "30 True"
        figures = r"-?\d[\d.e:,-]*"
        assert [re.sub(figures, "", b) for b in bars(again)] == [re.sub(figures, "", bar)]
        assert len(printed(again)) == len(printed(resumed))

    in_notebook(tmp_path, test)


def test_an_evaluation_has_one_bar_and_its_table(tmp_path: Path) -> None:
    async def test(notebook: Notebook) -> None:
        await notebook.run(DEFINITIONS)
        outputs = await notebook.run("_ = make('runs')[1].validate(make('runs')[0], data)")
        assert raised(outputs) == []
        (bar,) = bars(outputs)
        assert bar.startswith("validate 10/10 ") and " distance " in bar
        assert re.search(r"validate\n ─+\n  distance +-?\d", printed(outputs))
        (shown,) = displayed(outputs)
        assert shown["text/html"].startswith("<pre ") and "━</span>" in shown["text/html"]

    in_notebook(tmp_path, test)


def test_the_bar_stands_below_what_is_printed_at_the_beginning(tmp_path: Path) -> None:
    async def test(notebook: Notebook) -> None:
        await notebook.run(DEFINITIONS)
        outputs = await notebook.run("module, trainer = make('runs')\ntrainer.fit(module, data)")
        assert [one["output_type"] for one in outputs][-2:] == ["stream", "display_data"]
        assert "one batch  8 = 2 threads x 4" in printed(outputs)

    in_notebook(tmp_path, test)


def test_what_is_no_output_of_the_cell_gets_plain_lines(tmp_path: Path) -> None:
    async def test(notebook: Notebook) -> None:
        await notebook.run(DEFINITIONS)
        outputs = await notebook.run(
            "import io\n"
            "from composefit.callbacks import ProgressBar\n"
            "console = rich.console.Console(file=io.StringIO())\n"
            "bar = ProgressBar(console=console)\n"
            "Trainer(callbacks=bar, max_epochs=1, enable_model_summary=False).fit(GAN(), data)\n"
            "text = console.file.getvalue()\n"
            "assert text.startswith('epoch 1/1  10/10') and text.count('\\n') == 1, text\n"
        )
        assert raised(outputs) == [] and displayed(outputs) == []

    in_notebook(tmp_path, test)
