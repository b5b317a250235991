"""The one error of this package that a user can cause."""

from __future__ import annotations

from configs.errors import UserError


class DataError(UserError):
    """The corpus, the tokenizer or the prepared shards can't be used; the message says what to change."""
