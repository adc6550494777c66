"""The command line: `composefit demo`, `composefit doctor`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from composefit.doctor import doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: what stands after `composefit` on the command line; None takes them from there.

    Returns:
        The exit status: 0, or 1 where something that the command needs is not installed, or where
        the doctor finds that a trainer could not start.

    Raises:
        SystemExit: by argparse, with status 2, where the arguments make no sense.
    """
    parser = argparse.ArgumentParser(prog="composefit", description=__doc__)
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    _add_demo(commands)
    _add_doctor(commands)
    options = vars(parser.parse_args(arguments))
    command: Callable[..., int] = options.pop("command")
    return command(**options)


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
