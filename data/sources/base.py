"""What a source is.

A `Source` knows what it is (`identity`, part of the key of the prepared corpus) and gives `Reader`s. A reader yields
the text of one document after another in an order that depends on nothing but the source, holds one piece of it at a
time, and can say at any moment where the next document begins (`cursor`), so that a preparation that was killed goes on
there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.errors import DataError

Cursor = Mapping[str, Any]
"""A place in a source, as plain JSON values; the empty mapping is its beginning."""


class Reader(ABC):
    """One pass over a source."""

    @abstractmethod
    def __iter__(self) -> Iterator[str]:
        """Texts of the documents, in the source's order."""

    @abstractmethod
    def cursor(self) -> Cursor:
        """Where a later reader has to begin in order to go on after the document yielded last."""

    @abstractmethod
    def fraction(self) -> float | None:
        """Share of the source that has been read, or None where its size is unknown."""


class Source(ABC):
    """A corpus before tokenisation."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the documents and their order, as JSON values: equal identities hold equal documents."""

    @abstractmethod
    def description(self) -> str:
        """The source in a user's words, for messages."""

    @abstractmethod
    def read(self, cursor: Cursor | None = None) -> Reader:
        """A reader that begins at `cursor`, or at the beginning."""

    def num_parts(self) -> int:
        """Parts that a sample should be spread over; together they are the whole source."""
        return 1

    def read_part(self, index: int) -> Reader:
        """A reader of one of them."""
        assert index == 0, f"part {index} of 1"
        return self.read()


def text_of(record: Mapping[str, Any], text_key: str, where: str) -> str:
    """The text of a record; a missing one (None) is empty. Raises DataError that lists the keys there are."""
    if text_key not in record:
        raise missing_text_key(text_key, list(record), where)
    return checked_text(record[text_key], text_key, where)


def checked_text(value: object, text_key: str, where: str) -> str:
    """`value` if it is text, "" for None; else a DataError."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"data.text_key={text_key}: {where} holds a {type(value).__name__}, not text.")
    return value


def missing_text_key(text_key: str, keys: Sequence[str], where: str) -> DataError:
    """The error for a column that is not there."""
    there = ", ".join(keys[:20]) + (", ..." if len(keys) > 20 else "")
    return DataError(f"data.text_key={text_key} is not in {where}. There is: {there or 'nothing'}.")
