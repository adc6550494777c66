"""The report and the history behind it, as a real run of the trainer makes them."""

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, lr_scheduler

from composefit import Callback, LoopModule, OptimizerConfig, SingleDevice, Trainer
from composefit.callbacks import GradientNormMonitor, LearningRateMonitor, ThroughputMonitor
from composefit.callbacks.early_stopping import EarlyStopping
from composefit.images import Image
from tests.lockstep.steps import data, linear, module
from tests.lockstep.steps import trainer as quiet

BATCHES = list(data(24, 3).split(4))


class GAN(LoopModule):
    """Two optimizers: one updated in every step, one in every third."""

    def __init__(self, slope: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.generator, self.critic = linear(3, 3), linear(3, 1, seed=1)

    def configure_optimizers(self) -> Any:
        critic = SGD(self.critic.parameters(), lr=0.5)
        by_step = lr_scheduler.LinearLR(critic, start_factor=0.5, total_iters=10)
        return {
            "critic": OptimizerConfig(critic, by_step, interval="step"),
            "generator": Adam(self.generator.parameters(), lr=0.125),
        }

    def training_step(self, x: Tensor) -> Any:
        fake = self.generator(x)
        loss = self.critic(fake).square().mean()
        self.log("loss/critic", loss, on_epoch=True)
        yield {"critic": loss}
        if self.global_step % 3 == 0:
            loss = self.critic(fake).mean()
            self.log("loss/generator", loss)
            yield {"generator": loss}
        self.log("fakes", Image(fake[:1].abs() / 3))

    def validation_step(self, x: Tensor) -> None:
        self.log("val_loss/critic", self.critic(x).square().mean())


def trainer(folder: Path, **options: Any) -> Trainer:
    options = {"max_epochs": 2, "log_every_n_steps": 2, "seed": 0, "logger": False, **options}
    return Trainer(
        strategy=SingleDevice("cpu", shards=2),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def points(run: Trainer, name: str) -> list[tuple[int, float]]:
    steps, values = run.history.curves()[name]
    return list(zip(steps.tolist(), values.tolist(), strict=True))


def steps(run: Trainer, name: str) -> list[int]:
    return [step for step, _ in points(run, name)]


def text(path: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", path.read_text(encoding="utf-8")))


# -- what the trainer adds to the history --------------------------------------------------------


class Norms(Callback):
    """The gradients' norms at every update, computed by hand."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[int, float]]] = {"critic": [], "generator": []}

    def on_before_optimizer_step(
        self, trainer: Any, module: Any, optimizer: Any, name: str
    ) -> None:
        gradients = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]
        norm = torch.cat(gradients).norm().item()
        self.found[name].append((trainer.global_step + 1, norm))


def test_each_optimizers_norms_are_those_of_the_steps_that_updated_it(tmp_path: Path) -> None:
    """At the steps that are logged; of one that was not updated then, at its next update."""
    norms = Norms()
    run = trainer(tmp_path, callbacks=norms, enable_checkpointing=False)
    run.fit(GAN(), BATCHES)
    critic = [(step, pytest.approx(norm)) for step, norm in norms.found["critic"] if step % 2 == 0]
    assert points(run, "grad_norm/critic") == critic
    assert [step for step, _ in norms.found["generator"]] == [1, 4, 7, 10]
    generator = [(step, pytest.approx(n)) for step, n in norms.found["generator"] if step > 1]
    assert points(run, "grad_norm/generator") == generator


def test_learning_rates_are_those_that_the_logged_step_has_used(tmp_path: Path) -> None:
    run = trainer(tmp_path, enable_checkpointing=False)
    run.fit(GAN(), BATCHES)
    rates = [0.5 * min(1.0, 0.5 + 0.05 * (step - 1)) for step in range(2, 13, 2)]
    assert points(run, "lr/critic") == [
        (2 * i + 2, pytest.approx(rate)) for i, rate in enumerate(rates)
    ]
    assert points(run, "lr/generator") == [(step, 0.125) for step in range(2, 13, 2)]


def test_groups_are_named_as_the_monitor_names_them(tmp_path: Path) -> None:
    class Groups(GAN):
        def configure_optimizers(self) -> Any:
            weight, bias = self.critic.weight, self.critic.bias
            generator = list(self.generator.parameters())
            return {
                "critic": SGD([{"params": [weight], "lr": 0.1}, {"params": [bias], "lr": 0.2}]),
                "generator": SGD([{"params": generator, "name": "all", "lr": 0.3}]),
            }

    def rates(*callbacks: Callback) -> dict[str, Any]:
        run = trainer(tmp_path, callbacks=list(callbacks), enable_checkpointing=False)
        run.fit(Groups(), BATCHES)
        return {name: points(run, name)[0][1] for name in run.history.curves() if "lr/" in name}

    expected = {"lr/critic/pg1": 0.1, "lr/critic/pg2": 0.2, "lr/generator/all": 0.3}
    assert rates() == rates(LearningRateMonitor("step")) == expected


@pytest.mark.parametrize("interval", ["step", "epoch", None])
def test_what_a_monitor_logs_is_there_once(tmp_path: Path, interval: Any) -> None:
    monitors = [LearningRateMonitor(interval), GradientNormMonitor(1.0), ThroughputMonitor()]
    run = trainer(tmp_path, callbacks=monitors, enable_checkpointing=False)
    run.fit(GAN(), BATCHES, BATCHES[:1])
    own = [n for n in run.history.curves() if n.startswith(("lr/", "grad_norm/", "samples_per"))]
    assert len(own) == 5
    for name in own:
        found = steps(run, name)
        assert found == sorted(set(found)), name
    by_step = {"lr/critic": interval != "epoch", "lr/generator": interval == "step"}
    for name, every in by_step.items():
        assert steps(run, name) == ([2, 4, 6, 8, 10, 12] if every else [6, 12])


def test_the_monitors_norm_is_not_mixed_with_the_trainers(tmp_path: Path) -> None:
    class First(Callback):
        def on_before_optimizer_step(
            self, trainer: Any, module: Any, optimizer: Any, name: str
        ) -> None:
            if name == "critic":
                gradients = [p.grad.flatten() for p in module.critic.parameters()]
                found.append((trainer.global_step + 1, torch.cat(gradients).norm(1).item()))

    found: list[tuple[int, float]] = []
    callbacks = [GradientNormMonitor(1.0), First()]
    run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=False)
    run.fit(GAN(), BATCHES)
    expected = [(step, pytest.approx(norm)) for step, norm in found if step % 2 == 0]
    assert points(run, "grad_norm/critic") == expected


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as its one item."""
    time = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: time[0])
    return time


class Clock(Callback):
    """A step takes two seconds, a validation a hundred."""

    def __init__(self, now: list[float], saves: int = 0) -> None:
        self.now, self.saves = now, saves

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.now[0] += 2

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.now[0] += 100

    def on_train_batch_end(self, trainer: Any, module: Any) -> None:  # type: ignore[override]
        if trainer.global_step == self.saves:
            trainer.save_checkpoint("mid.ckpt")
            raise KeyError("stopped")


def test_samples_per_second_are_those_of_training(tmp_path: Path, now: list[float]) -> None:
    """Neither a validation counts, nor what a run had trained before it was stopped."""
    options: dict[str, Any] = {"enable_checkpointing": False, "val_check_interval": 3}
    run = trainer(tmp_path, callbacks=Clock(now), **options)
    run.fit(GAN(), BATCHES, BATCHES[:1])
    expected = [(step, 2.0) for step in range(2, 13, 2)]
    assert points(run, "samples_per_second") == expected
    with pytest.raises(KeyError, match="stopped"):
        trainer(tmp_path, callbacks=Clock(now, saves=8), **options).fit(GAN(), BATCHES, BATCHES[:1])
    now[0] += 5000
    run = trainer(tmp_path, callbacks=Clock(now), **options)
    run.fit(GAN(), BATCHES, BATCHES[:1], ckpt_path="mid.ckpt")
    assert points(run, "samples_per_second") == expected


# -- the report ----------------------------------------------------------------------------------


def test_a_report_shows_all_of_a_run_with_two_optimizers(tmp_path: Path) -> None:
    monitors = [LearningRateMonitor(), GradientNormMonitor(), ThroughputMonitor()]
    run = trainer(tmp_path, callbacks=monitors, gradient_clip_val=0.75)
    run.fit(GAN(slope=0.3125), BATCHES, BATCHES[:2])
    path = run.report()
    assert path == tmp_path / "report.html"
    shown = text(path)
    names = [
        *("loss/critic_step", "loss/critic_epoch", "loss/generator", "val_loss/critic"),
        *("lr/critic", "lr/generator", "grad_norm/critic", "grad_norm/generator"),
        *("samples_per_second", "batches_per_second", "steps_per_second"),
    ]
    assert set(names) == set(run.history.curves())
    for name in names:
        assert name in shown
    titles = re.findall(r"<h2>(.*?)</h2>", path.read_text())
    assert titles[:2] == ["critic", "generator"]
    assert titles[-3:] == ["Values", "Configuration", "Environment"]
    assert {"Speed", "Pictures"} <= set(titles)
    for setting in ("gradient_clip_val 0.75", "slope 0.3125", "SingleDevice", "LinearLR", "Adam"):
        assert setting in re.sub(r"\s+", " ", shown), setting
    assert str(torch.__version__) in shown
    assert re.search(r"steps\s+12\s", shown) and re.search(r"epochs\s+2\s", shown)
    assert 'class="status finished"' in path.read_text()
    assert len(run.history.pictures["fakes"]) == 6


def test_what_is_logged_after_the_last_epoch_makes_no_epoch_more(tmp_path: Path) -> None:
    class Tested(GAN):
        test_step = GAN.validation_step

        def on_fit_end(self) -> None:
            self.log("at the end", 1.0)

    run = trainer(tmp_path)
    run.fit(Tested(), BATCHES)
    run.test(Tested(), BATCHES, verbose=False)
    assert {"at the end", "val_loss/critic"} <= run.history.curves().keys()
    assert re.search(r"epochs\s+2\s", text(run.report()))


def test_a_report_before_any_fit_says_that_there_is_nothing(tmp_path: Path) -> None:
    path = trainer(tmp_path).report(tmp_path / "deep" / "other.html")
    assert path == tmp_path / "deep" / "other.html"
    assert "Nothing was logged." in text(path)
    assert "gradient_clip_val" in text(path)


def test_a_report_in_mid_run_says_that_it_runs(tmp_path: Path) -> None:
    class Look(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            found.append(trainer.report().read_text())

    found: list[str] = []
    trainer(tmp_path, callbacks=Look(), max_epochs=1).fit(GAN(), BATCHES)
    assert 'class="status running"' in found[0]


def test_a_report_after_a_failed_fit_shows_what_was_done(tmp_path: Path) -> None:
    class Fails(GAN):
        def on_train_batch_end(self) -> None:
            if self.global_step == 7:
                raise KeyError("stopped")

    run = trainer(tmp_path)
    with pytest.raises(KeyError, match="stopped"):
        run.fit(Fails(), BATCHES)
    path = run.report()
    assert 'class="status failed"' in path.read_text()
    assert re.search(r"epochs\s+2\s", text(path))
    assert steps(run, "lr/critic") == [2, 4, 6]
    run.fit(GAN(), BATCHES)  # another run: nothing of the one before is left
    assert steps(run, "lr/critic") == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("every", [2, 5])
def test_curves_of_a_resumed_run_are_those_of_one_that_never_stopped(
    tmp_path: Path, every: int
) -> None:
    """One curve each, in which no step comes twice; also what was logged after the checkpoint."""

    class Fails(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any) -> None:  # type: ignore[override]
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")
            if trainer.global_step == 11:
                raise KeyError("stopped")

    def fitted(ckpt_path: Path | None = None, **options: Any) -> Trainer:
        options |= {"log_every_n_steps": every, "enable_checkpointing": False}
        run = trainer(tmp_path, **options)
        run.fit(GAN(), BATCHES, BATCHES[:2], ckpt_path=ckpt_path)
        return run

    with pytest.raises(KeyError, match="stopped"):
        fitted(callbacks=Fails())
    whole, resumed = fitted(), fitted(tmp_path / "mid.ckpt")
    names = [name for name in whole.history.curves() if name != "samples_per_second"]
    assert len(names) == 8
    for name in names:
        assert points(resumed, name) == points(whole, name)
    kept = [
        {n: [(one.step, one.png) for one in p] for n, p in run.history.pictures.items()}
        for run in (whole, resumed)
    ]
    assert kept[0] == kept[1]
    assert re.search(r"steps\s+12\s", text(resumed.report()))


@pytest.mark.parametrize(
    "name",
    [
        "</script><script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "<!--",
        "a\0b\ud800",
        "../../etc/passwd",
        "val_" * 200,
        "_step",
        "/dataloader_idx_",
        "名前 🙂",
    ],
    ids=range(9),
)
def test_a_hostile_name_is_text(tmp_path: Path, name: str) -> None:
    caption = name.encode("utf-8", "replace").decode()

    class Hostile(GAN):
        def training_step(self, x: Tensor) -> Any:
            yield from super().training_step(x)
            self.log(name, 1.0, on_epoch=True)
            self.log(name + "image", Image(torch.zeros(2, 2), caption=caption))

    run = trainer(tmp_path, enable_checkpointing=False)
    run.fit(Hostile(), BATCHES)
    page = run.report().read_text(encoding="utf-8")
    assert page.count("<script") == 2
    assert "<img src=x" not in page
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_monitors_that_stop_a_run_leave_a_report_of_what_was_run(tmp_path: Path) -> None:
    stop = EarlyStopping("val_loss/critic", patience=1, mode="max")
    run = trainer(tmp_path, callbacks=stop, max_epochs=50)
    run.fit(GAN(), BATCHES, BATCHES[:1])
    assert run.history.step == run.global_step < 300
    shown = re.sub(r"\s+", " ", text(run.report()))
    assert f"steps {run.global_step} " in shown


def test_samples_per_second_count_every_step(tmp_path: Path) -> None:
    """Also where nobody has cut the batches, and their size is asked once."""

    class Counting(Callback):
        counts_samples = True

    run = quiet(callbacks=Counting(), max_epochs=2, log_every_n_steps=2)
    run.fit(module(lambda self, x: self.net(x).square().mean()), [torch.rand(4, 3).double()] * 6)
    _, rates = run.history.curves()["samples_per_second"]
    assert len(rates) == 6
    assert (rates > 0).all()
