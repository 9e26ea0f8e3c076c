"""The two ways a command fails, and the exit code of each."""


class RollaheadError(Exception):
    """A failure whose message is one sentence for the user: what was wrong, its value, the remedy."""

    exit_code = 1


class RunFailed(RollaheadError):
    """The run could not go on (exit code 1)."""


class UsageError(RollaheadError):
    """The command line, the configuration or an input is wrong (exit code 2)."""

    exit_code = 2
