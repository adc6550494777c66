"""The examples run, are short, say what they promise, and have the types that they show."""

import copy
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from composefit import Callback, SingleDevice, Strategy, ThreadDataParallel, Trainer

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))

# What each prints at its end, and what an untrained one prints.
FIGURES = {
    "regular_training": ("accuracy", 0.95, 0.7),
    "data_parallel_training": ("accuracy", 0.95, 0.7),
    "gan_training": ("mean distance from the circle", 0.15, 0.5),
    "data_parallel_gan_training": ("mean distance from the circle", 0.15, 0.5),
    "distributed_gan": ("mean distance from the circle", 0.15, 0.5),
    "fsdp_language_model": ("bits a character", 3.9, 4.7),
    "gan_by_hand": ("mean distance from the circle", 0.15, 0.5),
    "gan_wrapper": ("mean distance from the circle", 0.15, 0.5),
    "k_fold": ("accuracy", 0.85, 0.7),
    "actor_critic": ("mean return at the end", 100, 50),
}
# They bring an environment, a loop of their own, or a model and its data.
LONG = {"k_fold", "actor_critic", "fsdp_language_model"}
# As their users run them, in every run of the tests; all of them with `make laws`.
ALWAYS = {"data_parallel_gan_training", "k_fold"}
STRATEGIES = {"single": lambda: SingleDevice("cpu"), "threads": lambda: ThreadDataParallel(2)}


@pytest.fixture
def fresh_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in EXAMPLES:
        sys.modules.pop(name, None)


def test_each_example_has_its_figure() -> None:
    assert set(EXAMPLES) == set(FIGURES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_short(name: str) -> None:
    lines = len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines())
    assert lines < 60 or (name in LONG and lines <= 120)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, fresh_imports: None) -> None:
    main = importlib.import_module(name).main
    (length,) = {"epochs", "steps"} & set(inspect.signature(main).parameters)
    figures = main(**{length: 1})
    for figure in figures if isinstance(figures, tuple) else [figures]:
        assert isinstance(figure, float) and 0 < figure < FIGURES[name][1] + 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.full) for name in EXAMPLES],
)
def test_example_learns_as_its_user_runs_it(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", FOLDER / f"{name}.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    what, learned, untrained = FIGURES[name]
    (found,) = re.findall(rf"^{what} ([\d.]+)$", done.stdout, re.MULTILINE)
    if learned > untrained:
        assert float(found) > learned
    else:
        assert float(found) < learned


@pytest.mark.parametrize("name", ["training", "gan_training"])
def test_data_parallel_example_differs_from_the_other_by_its_strategy(name: str) -> None:
    other = {"training": "regular_training"}.get(name, name)
    code = (FOLDER / f"data_parallel_{name}.py").read_text(encoding="utf-8")
    (docstring,) = re.findall(r'^""".*?"""$', code, re.MULTILINE | re.DOTALL)
    assert_another_strategy(code.replace(docstring, ""), other, "ThreadDataParallel(threads=2)")


def test_the_gan_in_two_processes_differs_from_the_other_by_its_strategy() -> None:
    code = (FOLDER / "distributed_gan.py").read_text(encoding="utf-8")
    body = code[code.index("from ") :]
    assert_another_strategy(body, "gan_training", "Distributed(processes=2)")


def assert_another_strategy(body: str, other: str, strategy: str) -> None:
    lines = [line for line in body.splitlines() if line]
    shown = (FOLDER / f"{other}.py").read_text(encoding="utf-8").splitlines()[-1]
    assert lines == [
        f"from {other} import main",
        f"from composefit import {strategy[: strategy.index('(')]}",
        'if __name__ == "__main__":',
        shown.replace("main()", f"main({strategy})"),
    ]


# -- the language model ----------------------------------------------------------------------------


def test_bits_of_an_order_zero_model_are_the_entropy(fresh_imports: None) -> None:
    example = importlib.import_module("fsdp_language_model")
    text = torch.tensor([[1, 1, 2, 2, 3, 3, 4, 4, example.PADDING]]).repeat(10_000, 1)
    assert example.order_zero(text, text[:, :-1]) == pytest.approx(2, abs=0.01)


def test_a_file_is_cut_into_rows_and_padded_at_its_end(fresh_imports: None) -> None:
    example = importlib.import_module("fsdp_language_model")
    text = bytes(range(1, 101))
    rows = example.rows_of(text)
    assert rows.shape == (2, example.LENGTH + 1)
    assert bytes(rows.flatten()[:100].tolist()) == text
    assert (rows.flatten()[100:] == example.PADDING).all()


def test_padding_counts_neither_in_the_loss_nor_in_its_weight(fresh_imports: None) -> None:
    example = importlib.import_module("fsdp_language_model")
    model = example.Characters()
    text = torch.randint(1, 128, (3, example.LENGTH + 1))
    text[2, 20:] = example.PADDING
    (term,) = model.training_step(text).terms
    assert term.weight == 2 * example.LENGTH + 19
    alone = [model.training_step(row[None]).terms[0].total for row in (*text[:2], text[2])]
    torch.testing.assert_close(term.total, sum(alone))


# -- the two loops ---------------------------------------------------------------------------------


class Stop(Callback):
    """Ends the run at the n-th call of one of its hooks."""

    def __init__(self, hook: str, n: int) -> None:
        self.calls = 0

        def count(*_: Any) -> None:
            self.calls += 1
            if self.calls == n:
                raise KeyboardInterrupt

        setattr(self, hook, count)


def quiet(strategy: Strategy, folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        strategy=strategy,
        callbacks=list(callbacks),
        default_root_dir=folder,
        seed=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


@pytest.fixture
def k_fold(fresh_imports: None) -> Any:
    return importlib.import_module("k_fold")


@pytest.fixture
def actor_critic(fresh_imports: None) -> Any:
    return importlib.import_module("actor_critic")


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_scores_of_folds_are_those_of_fits_by_hand(
    k_fold: Any, strategy: Callable[[], Strategy], tmp_path: Path
) -> None:
    data, begin = k_fold.rings(300), k_fold.Classifier()
    loop, module = k_fold.KFoldLoop(data, folds=3, epochs=2), copy.deepcopy(begin)
    scores = quiet(strategy(), tmp_path).run(loop, module)

    by_hand = []
    for fold in range(3):
        train = Subset(data, [i for i in range(300) if i % 3 != fold])
        left_out = Subset(data, [i for i in range(300) if i % 3 == fold])
        own, trainer = copy.deepcopy(begin), quiet(strategy(), tmp_path, max_epochs=2)
        trainer.fit(own, DataLoader(train, batch_size=64, shuffle=True))
        own.eval()
        points, labels = zip(*left_out, strict=True)
        right = own.net(torch.stack(points)).argmax(1) == torch.stack(labels)
        by_hand.append(right.float().mean().item())
    assert scores == pytest.approx(by_hand, rel=1e-6)
    assert len(set(scores)) > 1
    assert same(module, own)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize(
    ("hook", "n"),
    [
        ("on_train_batch_end", 3),  # within an epoch
        ("on_train_batch_end", 4),  # its last step
        ("on_train_batch_end", 8),  # the last step of a fold
        ("on_validation_batch_end", 1),  # while it is measured
        ("on_validation_end", 2),
        ("on_train_batch_end", 18),  # in the last fold
    ],
)
def test_cross_validation_goes_on_bitwise_where_it_was_stopped(
    k_fold: Any, strategy: Callable[[], Strategy], hook: str, n: int, tmp_path: Path
) -> None:
    def make() -> tuple[Any, Any]:
        torch.manual_seed(1)
        return k_fold.KFoldLoop(k_fold.rings(300), folds=3, epochs=2), k_fold.Classifier()

    loop, whole = make()
    expected = quiet(strategy(), tmp_path / "whole").run(loop, whole)

    loop, module = make()
    with pytest.raises(KeyboardInterrupt):
        quiet(strategy(), tmp_path, Stop(hook, n)).run(loop, module)
    assert len(loop.scores) < 3

    loop, module = make()
    torch.nn.init.zeros_(module.net[0].weight)  # everything comes from the file
    found = quiet(strategy(), tmp_path).run(loop, module, ckpt_path="last")
    assert found == expected and same(module, whole)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize(
    ("hook", "n"),
    [
        ("on_train_batch_end", 7),
        ("on_before_optimizer_step", 13),  # what was played for step 7 is not trained on
    ],
)
def test_play_goes_on_bitwise_where_it_was_stopped(
    actor_critic: Any, strategy: Callable[[], Strategy], hook: str, n: int, tmp_path: Path
) -> None:
    def run(folder: Path, *callbacks: Callback, ckpt_path: str | None = None) -> Any:
        torch.manual_seed(1)
        loop, module = actor_critic.PlayAndLearn(carts=8, horizon=5), actor_critic.ActorCritic()
        if ckpt_path is not None:
            torch.nn.init.zeros_(module.actor[0].weight)
            loop.play(module)
        trainer = quiet(strategy(), folder, *callbacks, max_steps=12)
        trainer.run(loop, module, ckpt_path=ckpt_path)
        assert trainer.updates == {"critic": 12, "actor": 12}
        return loop, module

    loop, whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Stop(hook, n))
    resumed, module = run(tmp_path, ckpt_path="last")
    assert same(module, whole)
    assert torch.equal(resumed.carts.state, loop.carts.state)


def test_play_is_learned_and_not_by_chance(actor_critic: Any) -> None:
    coin = actor_critic.ActorCritic()
    for parameter in coin.actor.parameters():  # pushes left and right alike
        torch.nn.init.zeros_(parameter)
    chance = actor_critic.mean_return(coin)
    assert 15 < chance < 35
    start, end = actor_critic.main(SingleDevice("cpu"), steps=100)
    assert start < 2 * chance and end > 3 * chance


# -- types -----------------------------------------------------------------------------------------

FORMS = """
from torch import Tensor
from composefit import Gather, LoopModule, Mean, Once, Step, Sum, Update

class Forms(LoopModule):
    def training_step(self, x: Tensor) -> Step:
        everything, offset = yield from Gather(x)
        reveal_type(everything)
        reveal_type(offset)
        pair, _ = yield from Gather((x, x))
        reveal_type(pair)
        mean = yield from Mean(x.sum(), x.numel())
        reveal_type(mean)
        total = yield from Sum(x.sum())
        reveal_type(total)
        losses = yield from Update({"a": x.mean()})
        reveal_type(losses)
        result = yield from Once(self.keep, x)
        reveal_type(result)
        yield x.mean()
        yield {"a": x.mean(), "b": Mean.of(x.mean(), 3) + 0.1 * Sum(x.sum())}
        yield 3
        return x.mean()

    def keep(self, x: Tensor) -> int:
        return len(x)

Gather(3)
"""
REVEALED = [
    "torch._tensor.Tensor",
    "int",
    "tuple[torch._tensor.Tensor, ...]",
    "torch._tensor.Tensor",
    "torch._tensor.Tensor",
    "dict[str, torch._tensor.Tensor]",
    "Any",
]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What mypy says of all examples and of `FORMS`, in one run."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "forms.py").write_text(FORMS)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"),
            *("--follow-imports", "silent", "--cache-dir", folder / "cache"),
            "--allow-untyped-calls",  # torch's own backward() has no types
            *FOLDER.glob("*.py"),
            folder / "forms.py",
        ],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # of the two errors in FORMS
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.xdist_group("types")
def test_examples_are_typed(checked: list[str]) -> None:
    assert [line for line in checked if ": error:" in line and "forms.py" not in line] == []


@pytest.mark.slow
@pytest.mark.xdist_group("types")
def test_what_comes_back_from_an_effect_is_typed(checked: list[str]) -> None:
    revealed = [re.findall(r'Revealed type is "(.*)"$', line) for line in checked]
    found = [kind.replace("builtins.", "") for kinds in revealed for kind in kinds]
    assert found == REVEALED


@pytest.mark.slow
@pytest.mark.xdist_group("types")
def test_what_a_step_may_not_yield_is_an_error(checked: list[str]) -> None:
    errors = [line for line in checked if "forms.py" in line and ": error:" in line]
    assert ["[misc]" in errors[0], "[call-overload]" in errors[1], len(errors)] == [True, True, 2]
