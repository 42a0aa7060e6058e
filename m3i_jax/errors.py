"""Errors that reach a person: one line, what was wrong, why, what to do."""


class UserError(Exception):
    """A mistake of the person at the keyboard: main prints the message on one line and exits 2,
    without a traceback."""

    status = 2  # of the process


class UnreadableError(UserError):
    """Data that could be read when the run began cannot be read any more."""


class RunStopped(Exception):
    """The run cannot go on, through nobody's mistake: main prints the message on one line and exits
    1, without a traceback."""


class DoesNotFit(UserError):
    """The program does not fit the device it was compiled for: exit 3."""

    status = 3
