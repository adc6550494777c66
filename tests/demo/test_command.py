"""The command line of the demo: what it refuses, and what it says where something is missing."""

import pytest

from composefit import cli
from composefit.demo import extras


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--epochs", "many"], "--epochs: expected a whole number, got 'many'"),
        (["--threads", "-2"], "--threads: expected at least 1, got -2"),
        (["--accumulate", "1.5"], "--accumulate: expected a whole number, got '1.5'"),
        (["--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["--strategy", "ddp"], "--strategy: invalid choice: 'ddp'"),
        (["--strategy", "single", "--threads", "2"], "--threads belongs to --strategy threads"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "required: command" in capsys.readouterr().err


def test_a_missing_extra_is_an_error_that_names_it_and_gives_the_command() -> None:
    with pytest.raises(ModuleNotFoundError) as missing:
        extras.require_extras({"json": "json", "no_such_module": "scikit-nothing"})
    assert 'pip install "composefit[demo]"' in str(missing.value)
    assert "needs scikit-nothing, which" in str(missing.value)


def test_the_command_ends_with_that_message_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == (
        "composefit demo: the demo needs scikit-learn and matplotlib, which a plain composefit "
        'does not bring: pip install "composefit[demo]"\n'
    )
