"""Errors that reach a person: one line, what was wrong, why, what to do."""


class UserError(Exception):
    """A mistake of the person at the keyboard: main prints the message on one line and exits 2, without a traceback."""


class DoesNotFit(UserError):
    """The program does not fit the device it was compiled for: exit 3."""
