"""The error that a user reads."""

USER_ERROR_EXIT_CODE = 2
"""A wrong key, value, file or option."""
OUT_OF_MEMORY_EXIT_CODE = 3
"""The GPU's memory does not suffice for the model at this micro-batch."""
INTERRUPTED_EXIT_CODE = 130
"""Ctrl-C, as shells have it."""
TERMINATED_EXIT_CODE = 143
"""SIGTERM, as shells have it."""
PIPE_EXIT_CODE = 141
"""The reader of what a tool prints has gone: what shells have for SIGPIPE."""
OUT_OF_MEMORY = "Out of GPU memory"
"""How the message of that begins."""

REQUEUE_EXIT_CODE = 75
"""After SIGUSR1 (EX_TEMPFAIL): saved, and meant to be started again. A job script tests it and requeues."""


class UserError(Exception):
    """A message to show without a traceback: what was given, what is wrong with it, and the remedy."""

    exit_code = USER_ERROR_EXIT_CODE


class OutOfMemoryError(UserError):
    """The GPU is too small for what was asked."""

    exit_code = OUT_OF_MEMORY_EXIT_CODE
