"""The process that tokenises: reads batches of texts from its standard input, writes tokens to its standard output.

Started as a file by `data.encode`, not through multiprocessing: it imports neither the caller's main module nor torch
(it is ready in 0.2 s), and when its parent is killed it reads the end of its input and ends as well.
Messages are pickles between parent and child; a batch in, `Encoded` as a plain tuple out.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

PIECE_CHARS = 1 << 20
"""Longer documents are encoded in pieces cut at a line end, and no more text at a time than this, because an encoding
takes 80 times its text in memory."""

OF_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that a terminal or a launcher sends to the whole group, and that mean something to the parent alone: when it
ends, so does this process."""


def encode_batch(
    tokenizer: Tokenizer, texts: Sequence[str], eos_id: int, dtype: str, max_tokens: int
) -> tuple[bytes, list[int], list[int], list[int]]:
    """Tokens of the documents that are not empty, a separator before each.

    Returns (tokens of all documents as `dtype`; tokens per document; bytes of text per document; hash of the text per
    document). A document of more than `max_tokens` tokens becomes several, the text's bytes counted with its first.
    """
    encoded, lengths, num_bytes, hashes = [], [], [], []
    separator = np.array([eos_id], dtype).tobytes()
    pieces = [list(_pieces(text)) for text in texts]
    ids = _encoded(tokenizer, [piece for group in pieces for piece in group], dtype)
    for text, group in zip(texts, pieces, strict=True):
        parts = list(islice(ids, len(group)))
        body = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])  # (tokens,)
        if not len(body):
            continue
        data = text.encode()
        digest = text_hash(data)
        for start in range(0, len(body), max_tokens - 1):
            part = body[start : start + max_tokens - 1]
            encoded += [separator, part.tobytes()]
            lengths.append(1 + len(part))
            num_bytes.append(len(data) if start == 0 else 0)
            hashes.append(digest)
    return b"".join(encoded), lengths, num_bytes, hashes


def _encoded(tokenizer: Tokenizer, pieces: Sequence[str], dtype: str) -> Iterator[npt.NDArray[Any]]:
    """Ids of each piece, (tokens,); of the encodings themselves only those of `PIECE_CHARS` of text exist at once."""
    first = 0
    while first < len(pieces):
        stop, chars = first + 1, len(pieces[first])
        while stop < len(pieces) and chars + len(pieces[stop]) <= PIECE_CHARS:
            chars += len(pieces[stop])
            stop += 1
        for encoding in tokenizer.encode_batch_fast(pieces[first:stop], add_special_tokens=False):
            yield np.array(encoding.ids, dtype)
        first = stop


def text_hash(data: bytes) -> int:
    """64 bits that depend on nothing but the text: they decide whether a document is held out."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = text.rfind("\n", start + PIECE_CHARS // 2, start + PIECE_CHARS) + 1 or start + PIECE_CHARS
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def load(path: str) -> Tokenizer:
    """The tokenizer, set to take a separator that occurs in a text as text."""
    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def main(arguments: list[str]) -> int:
    """Serves batches until the input ends. Arguments: tokenizer file, separator id, dtype, most tokens a document."""
    for number in OF_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_THE_PARENT)  # blocked since before this process began
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    tokenizer = load(arguments[0])
    eos_id, dtype, max_tokens = int(arguments[1]), arguments[2], int(arguments[3])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing that a library prints may get between the answers
    while True:
        try:
            texts = pickle.load(sys.stdin.buffer)
        except EOFError:
            return 0
        pickle.dump(encode_batch(tokenizer, texts, eos_id, dtype, max_tokens), answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
