"""The command line: `composefit check`, `explain`, `demo` and `doctor`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from composefit.data import as_loader
from composefit.doctor import doctor
from composefit.module import LoopModule
from composefit.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: what stands after `composefit` on the command line; None takes them from there.

    Returns:
        The exit status: 0, or 1 where something that the command needs is not installed, where
        the doctor finds that a trainer could not start, or the check a loss that is wrong.

    Raises:
        SystemExit: with status 2, where the arguments make no sense, or the file that they name
            does not give what is needed.
    """
    parser = argparse.ArgumentParser(prog="composefit", description=__doc__)
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    _add_check(commands)
    _add_explain(commands)
    _add_demo(commands)
    _add_doctor(commands)
    options = vars(parser.parse_args(arguments))
    command: Callable[..., int] = options.pop("command")
    return command(**options)


# -- what is run on a file -------------------------------------------------------------------------


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _on_a_file(
        commands,
        "check",
        "find losses that mean something else when a batch is cut",
        "Compare the gradients of a batch taken whole and in two unequal shards, and say for each "
        "optimizer whether they agree, and what to write where they do not.",
    )
    parser.add_argument(
        "--batches", type=_positive, default=1, metavar="N", help="of the loader (default: 1)"
    )

    def check(batches: int, **options: Any) -> int:
        with _built(parser, options.pop("file")) as (module, loader):
            trainer = _trainer(parser, **options)
            taken = _Batches(_first(parser, loader, batches))
            with _blaming(parser, "the step raised"):
                report = trainer.check(module, taken, batches)
        return 0 if report.ok else 1

    parser.set_defaults(command=check)


def _add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _on_a_file(
        commands,
        "explain",
        "show what one training step does, and how long that takes",
        "Run the step on a copy of the module and print its plan: effects in their order, what "
        "each updates, the shards, what is kept and sent, the peak memory.",
    )
    parser.add_argument(
        "--precision", default="32", help="as in Trainer(precision=...) (default: 32)"
    )
    parser.add_argument(
        "--microbatch", type=_positive, metavar="N", help="the most samples of a shard"
    )
    parser.add_argument(
        "--clip", type=float, metavar="NORM", help="as in Trainer(gradient_clip_val=...)"
    )
    parser.add_argument(
        "--step", type=_natural, default=0, metavar="N", help="the number of the step (default: 0)"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw it into this file, too")

    def explain(step: int, svg: Path | None, **options: Any) -> int:
        with _built(parser, options.pop("file")) as (module, loader):
            trainer = _trainer(parser, **options)
            (batch,) = _first(parser, loader, 1)
            with _blaming(parser, "the step raised"):
                plan = trainer.explain(module, batch, step=step)
        if svg is not None:
            print(f"drawn in {plan.save(svg)}")
        return 0

    parser.set_defaults(command=explain)


def _on_a_file(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    help: str,
    description: str,
) -> argparse.ArgumentParser:
    """A command with the arguments that say of what, and how it would be carried out."""
    parser = commands.add_parser(name, help=help, description=description)
    parser.add_argument(
        "file",
        metavar="FILE[:FUNCTION]",
        help="a Python file, and its function that returns (module, loader) (default: build)",
    )
    parser.add_argument(
        "--strategy",
        choices=["auto", "single", "threads", "ddp", "fsdp"],
        default="auto",
        help="how a step is carried out (default: auto)",
    )
    parser.add_argument("--devices", default="auto", help="how many: threads on a CPU, or GPUs")
    parser.add_argument(
        "--accumulate", type=_positive, default=1, metavar="N", help="loader batches in a step"
    )
    return parser


def _trainer(
    parser: argparse.ArgumentParser,
    strategy: str,
    devices: str,
    accumulate: int,
    precision: str = "32",
    microbatch: int | None = None,
    clip: float | None = None,
) -> Trainer:
    """A trainer that leaves no files behind."""
    try:
        return Trainer(
            strategy=strategy,
            devices=devices,
            precision=precision,
            accumulate_grad_batches=accumulate,
            microbatch_size=microbatch,
            gradient_clip_val=clip,
            seed=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
    except (TypeError, ValueError) as error:
        parser.error(str(error))


@contextmanager
def _built(parser: argparse.ArgumentParser, file: str) -> Iterator[tuple[LoopModule, Any]]:
    """The module and loader of a file, whose folder can be imported from meanwhile."""
    name, colon, function = file.rpartition(":")
    # The colon of a drive is none, nor is one within a name that is there as it stands.
    if not colon or not function.isidentifier() or Path(file).is_file():
        name, function = file, "build"
    path = Path(name)
    if not path.is_file():
        parser.error(f"there is no file {name}")
    if path.suffix != ".py":
        parser.error(f"{name} is no Python file: expected FILE.py or FILE.py:FUNCTION")
    folder, before = str(path.resolve().parent), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        with _blaming(parser, f"{name} raised"):
            made = _call(parser, path, function)
        yield _module_and_loader(parser, f"{name}: {function}()", made)
    finally:
        sys.path.remove(folder)
        for found in set(sys.modules) - before:
            source = getattr(sys.modules[found], "__file__", None)
            if source is not None and str(Path(source).parent) == folder:
                del sys.modules[found]


def _call(parser: argparse.ArgumentParser, path: Path, function: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"composefit_file_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks itself up
    spec.loader.exec_module(module)
    build = getattr(module, function, None)
    if not callable(build):
        parser.error(
            f"{path} has no function {function}: write one that returns (module, loader), "
            f"or name it, {path}:FUNCTION"
        )
    return build()


def _module_and_loader(parser: argparse.ArgumentParser, what: str, made: Any) -> tuple[Any, Any]:
    if not isinstance(made, tuple) or len(made) != 2:
        parser.error(f"{what} must return (module, loader), it returned {_kind(made)}")
    module, loader = made
    if not isinstance(module, LoopModule):
        parser.error(
            f"{what} must return a composefit.LoopModule and a loader, the first is {_kind(module)}"
        )
    try:
        return module, as_loader(loader, f"what {what} returned beside the module")
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def _kind(value: object) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _first(parser: argparse.ArgumentParser, loader: Any, count: int) -> list[Any]:
    """The first batches; the loader is ours alone."""
    with _blaming(parser, "the loader raised"):
        found = list(islice(loader, count))
    if not found:
        parser.error("the loader gave no batch at all: is the dataset empty?")
    return found


class _Batches:
    """A loader of these batches; a list would be taken for one batch."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@contextmanager
def _blaming(parser: argparse.ArgumentParser, what: str) -> Iterator[None]:
    """What the file's code raises ends the command, its traceback beginning there."""
    try:
        yield
    except Exception as error:
        shown = error.with_traceback(_from_the_file(error.__traceback__))
        text = "".join(traceback.format_exception(shown))
        parser.exit(2, f"{text}\n{parser.prog}: {what} {type(error).__name__}, see above\n")


def _from_the_file(found: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames of this file, and of importing, at its beginning."""
    own = (__file__, "<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")
    while found is not None and found.tb_frame.f_code.co_filename in own:
        found = found.tb_next
    return found


# -- the demo and the doctor -----------------------------------------------------------------------


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a GAN on handwritten digits",
        description="Train a GAN on handwritten digits, both networks in one training step, and "
        "leave samples.png, curves.png, metrics.csv and report.html in a folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--strategy",
        choices=["single", "threads"],
        default="threads",
        help="how a step is carried out",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        default=argparse.SUPPRESS,
        help="how many threads (default: the cores that this process may use)",
    )
    parser.add_argument(
        "--epochs", type=_positive, default=64, metavar="N", help="passes over the digits"
    )
    parser.add_argument(
        "--accumulate", type=_positive, default=1, metavar="N", help="loader batches in a step"
    )
    parser.add_argument(
        "--seed", type=_natural, default=0, metavar="N", help="of weights, noise and order"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="where files go"
    )

    def demo(**options: object) -> int:
        if "threads" in options and options["strategy"] != "threads":
            parser.error("--threads belongs to --strategy threads: leave one of the two out")
        return _demo(parser, **options)

    parser.set_defaults(command=demo)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what this machine has, and which strategy it would take",
        description="Print versions, cores, memory, GPUs, back ends of torch.distributed, the job "
        "that this process is a rank of, and the strategy that Trainer(strategy='auto') would take "
        "here, and why. What may be a problem begins with '!'.",
    )
    parser.add_argument(
        "--json", dest="as_json", action="store_true", help="for a program, or a bug report"
    )
    parser.set_defaults(command=doctor)


def _demo(parser: argparse.ArgumentParser, **options: object) -> int:
    """Run the demo, which is imported here alone: nothing else needs its extras."""
    from composefit.demo.extras import require_extras

    try:
        require_extras()
    except ModuleNotFoundError as missing:
        parser.exit(1, f"{parser.prog}: {missing}\n")
    from composefit.demo.run import run

    run(**options)  # type: ignore[arg-type]
    return 0


def _positive(text: str) -> int:
    return _whole(text, least=1)


def _natural(text: str) -> int:
    return _whole(text, least=0)


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"expected at least {least}, got {number}")
    return number
