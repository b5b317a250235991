"""Tokenizers: a byte-level BPE trained on the corpus, or one that exists already, by file or hub name.

Byte-level BPE (Sennrich et al. 2016 on bytes, as in GPT-2) starts from the 256 bytes, so that every text can be encoded
and decoded without loss. One special token, `<|endoftext|>`, stands **before** each document: the model sees where a
document begins, and the token after a document's last one is the next document's separator, so that every position of
the stream has a meaningful target, with document masks and without.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.errors import DataError
from data.sources.hub import hub_errors, probe_hub, within_time

END_OF_TEXT = "<|endoftext|>"
_KNOWN_SEPARATORS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]")
TOKENIZER_CONFIG = "tokenizer_config.json"
"""Beside a tokenizer.json: names its separator as `eos_token`."""
SEPARATOR = "separator.json"
"""The same beside a tokenizer in the cache, where it says what was found: that is no part of a corpus's key."""
SMALLEST_VOCABULARY = 257  # 256 bytes and the separator


@dataclass(frozen=True)
class TokenizerInfo:
    """What the shards and the model need to know about a tokenizer."""

    vocab_size: int
    """Token ids are below this."""
    eos_token: str
    eos_id: int
    """The separator before each document."""
    hash: str
    """sha256 of its definition."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, special token included; a small corpus may give fewer.

    Depends on the texts alone: ties between pairs are broken by token id. Raises DataError for `vocab_size` < 257.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"data.tokenizer_vocab_size={vocab_size}: 256 bytes and {END_OF_TEXT} need at least {SMALLEST_VOCABULARY}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(END_OF_TEXT, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_identity(name: str) -> dict[str, str]:
    """What decides an existing tokenizer, as JSON values: content and named separator of a file, else a hub name."""
    path = _local_definition(name)
    if path is None:
        return {"hub": name}
    identity = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    separator = _named_separator(path.with_name(TOKENIZER_CONFIG))
    return identity if separator is None else {**identity, "eos_token": separator}


def fetch_tokenizer(name: str, cache_dir: Path) -> tuple[Tokenizer, str | None]:
    """The tokenizer that `data.tokenizer` names, and the separator that is named beside it, if any.

    `name` is a `tokenizer.json`, a folder with one, or a hub name. Raises DataError with what was looked for.
    """
    path = _local_definition(name) or _download(name, "tokenizer.json", cache_dir)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for what it can't parse
        raise DataError(f"data.tokenizer={name}: {path} is not a tokenizer.json of `tokenizers`: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = path.with_name(TOKENIZER_CONFIG)
    if not config.is_file() and _local_definition(name) is None:
        config = _download_if_there(name, TOKENIZER_CONFIG, cache_dir) or config
    return tokenizer, _named_separator(config) or _named_separator(path.with_name(SEPARATOR))


def inspect_tokenizer(tokenizer: Tokenizer, eos_token: str | None = None) -> TokenizerInfo:
    """Sizes and separator of a tokenizer. Raises DataError where no separator is found."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    candidates = [eos_token] if eos_token else list(_KNOWN_SEPARATORS)
    separator = next((token for token in candidates if token in vocabulary), None)
    if separator is None:
        raise DataError(
            f"data.tokenizer has no token that separates documents; looked for {', '.join(map(str, candidates))}. "
            f"Name it as eos_token in a tokenizer_config.json beside tokenizer.json."
        )
    digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    return TokenizerInfo(max(vocabulary.values()) + 1, separator, vocabulary[separator], digest)


def _local_definition(name: str) -> Path | None:
    """The file of a local tokenizer, or None for a hub name. Raises DataError for a path that is not there."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return path
    is_hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".") and path.suffix != ".json"
    if not is_hub_name:
        raise DataError(
            f"data.tokenizer={name}: no such file (looked for {path.absolute()}). "
            "Give `train`, a tokenizer.json, a folder that holds one, or a hub name such as gpt2."
        )
    return None


def _download(name: str, file: str, cache_dir: Path) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    folder = str(cache_dir / "hub")
    cached = try_to_load_from_cache(name, file, cache_dir=folder)
    if isinstance(cached, str):
        return Path(cached)
    what = f"data.tokenizer={name} ({file})"
    probe_hub(what, f"models/{name}")
    with hub_errors(what):
        return Path(within_time(what, lambda: hf_hub_download(name, file, cache_dir=folder)))


def _download_if_there(name: str, file: str, cache_dir: Path) -> Path | None:
    """None where the repository has no such file."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _download(name, file, cache_dir)
    except DataError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return None
        raise


def _named_separator(config: Path) -> str | None:
    if not config.is_file():
        return None
    try:
        value = json.loads(config.read_text("utf-8"))
        token = value.get("eos_token")
        name = token["content"] if isinstance(token, dict) else token
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"data.tokenizer: {config} is not a tokenizer_config.json: {error}") from error
    if name is not None and not isinstance(name, str):
        raise DataError(f"data.tokenizer: {config}: eos_token is {name!r}, not the text of a token.")
    return name


def name_separator(folder: Path, eos_token: str) -> None:
    """Writes the `tokenizer_config.json` that goes with a tokenizer.json in `folder`."""
    (folder / TOKENIZER_CONFIG).write_text(json.dumps({"eos_token": eos_token}), "utf-8")


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes the definition so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(tokenizer.to_str(pretty=True))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
