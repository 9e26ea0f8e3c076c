"""The `rollahead` command: parse and call."""

import argparse
import os
import sys
from collections.abc import Callable

from pipeline.command_line import build_parser
from pipeline.errors import RollaheadError


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit codes: 0 done, 1 the run failed, 2 command or configuration wrong, 130 interrupted."""
    options = build_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.call
    try:
        return command(options)
    except RollaheadError as error:
        sys.stderr.write(f"rollahead: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("rollahead: interrupted\n")
        return 130
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    """A defect of ours: one line first, the traceback below it for the report."""
    import traceback

    sys.stderr.write(f"rollahead: {type(error).__name__}: {error}\n")
    if os.environ.get("ROLLAHEAD_TRACEBACK", "1") != "0":
        sys.stderr.write("".join(traceback.format_exception(error)))
    return 1


if __name__ == "__main__":
    sys.exit(main())
