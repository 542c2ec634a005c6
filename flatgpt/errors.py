"""
The errors that a user can correct. configurator.show_error prints them as one line and exits with their status.
"""


class UserError(Exception):
    """The work cannot go on, and the user can do something about it: the message says what. Exit status 1."""
    status = 1


class UsageError(UserError):
    """An option has a wrong name or value, or options exclude each other. Exit status 2."""
    status = 2
