"""What a report that is passed around must not tell."""

from __future__ import annotations

import re
from collections.abc import Sequence

#: What stands in the place of a secret.
HIDDEN = "•••"

_SECRET = re.compile(
    r"(?:^|[^a-z])(?:api_?key|(?:access|private|secret)_?key|key|token|secret|password|passwd|pwd"
    r"|auth|credentials?)(?:$|[^a-z])"
)
_IN_ADDRESS = re.compile(r"(\w+://)[^/\s@]+@")


def is_secret(name: str) -> bool:
    """Whether a setting of this name is one to keep to oneself.

    Example:
        >>> [is_secret(name) for name in ("--api-key", "WANDB_TOKEN", "tokenizer", "max_tokens")]
        [True, True, False, False]
    """
    # apiKey as api_key
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_")
    return _SECRET.search(snake) is not None


def without_credentials(text: str) -> str:
    """Text without the user and password of the addresses in it.

    Example:
        >>> without_credentials("tracking at db://me:pass@host/x")
        'tracking at db://•••@host/x'
    """
    return _IN_ADDRESS.sub(rf"\g<1>{HIDDEN}@", text)


def command_line(arguments: Sequence[str]) -> str:
    """A command line, with the values of secret options hidden.

    Args:
        arguments: as in `sys.argv`.

    Example:
        >>> command_line(["train.py", "--lr", "0.1", "--token", "abc", "--api-key=xyz"])
        'train.py --lr 0.1 --token ••• --api-key=•••'
    """
    shown: list[str] = []
    hide = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hide and not argument.startswith("-"):
            argument = HIDDEN
        elif equals and is_secret(name):
            argument = f"{name}={HIDDEN}"
        hide = not equals and argument.startswith("-") and is_secret(argument)
        quoted = f'"{argument}"' if " " in argument else argument
        shown.append(without_credentials(quoted))
    return " ".join(shown)
