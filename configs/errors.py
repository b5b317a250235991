"""The error that a user reads."""


class UserError(Exception):
    """A message to show without a traceback: what was given, what is wrong with it, and the remedy."""
