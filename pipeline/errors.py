"""The two ways a command fails, and the exit code of each."""

import re


class RollaheadError(Exception):
    """A failure whose message is one sentence for the user: what was wrong, its value, the remedy."""

    exit_code = 1


class RunFailed(RollaheadError):
    """The run could not go on (exit code 1)."""


class UsageError(RollaheadError):
    """The command line, the configuration or an input is wrong (exit code 2)."""

    exit_code = 2


def check_text(text: str, option: str) -> None:
    """Refuse what a command line had in bytes that are no text.

    Raises:
        UsageError: `option` is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{option} {text!r} is not UTF-8 at character {error.start + 1}; write it in UTF-8") from None


def complaint(message: str) -> tuple[str, str]:
    """Key and sentence of what msgspec says: "Expected `int` >= 1 - at `$.tokens`" is of `tokens`, "expected int >= 1".

    The key is empty where the message names none.
    """
    found = re.fullmatch(r"(?P<what>.*?)(?: - at `\$\.?(?P<key>[^`]*)`)?", message, re.DOTALL)
    assert found is not None  # it matches anything
    what = found["what"].replace("`", "")
    return found["key"] or "", what[:1].lower() + what[1:]
