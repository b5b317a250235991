"""From a source to a prepared corpus: `prepare` finds it in the cache or makes it.

The work happens in `<key>.partial` under a lock, a document after the other in the source's order, whatever the number
of workers. With every finished shard, and every few seconds, `state.json` records how far source and shards are; after
a kill the next call goes on from there. At the end everything is synced and the folder renamed to `<key>`, which is all
that readers look at.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from tokenizers import Tokenizer

from configs.schema import DataConfig
from configs.schema import Source as Kind
from data.encode import Encoded, Encoder, batches
from data.errors import DataError
from data.mixture import EMPTY, MixedDataset, source_configs
from data.shards import (
    FORMAT,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    ShardWriter,
    SplitInfo,
    TokenDataset,
    can_resume,
    damaged,
    sync_folder,
    token_dtype,
    write_synced,
)
from data.sources import Cursor, Source, open_sources
from data.tokenizer import (
    SEPARATOR,
    TokenizerInfo,
    fetch_tokenizer,
    inspect_tokenizer,
    save_tokenizer,
    tokenizer_identity,
    train_tokenizer,
)
from data.worker import text_hash

_LOG = logging.getLogger(__name__)

STATE = "state.json"
STATE_INTERVAL_S = 10.0
REPORT_INTERVAL_S = 0.2
HASH_RANGE = 1 << 64
TOKENIZER_SAMPLE_CHARS = 1 << 30
"""A tokenizer is trained on at most this much text, spread over the files of the source, so that memory is bounded."""
HOLDOUT_PROBE_DOCUMENTS = 10_000


@dataclass(frozen=True)
class Progress:
    """How far a preparation is."""

    stage: Literal["wait", "tokenizer", "tokenize"]
    """wait: another process prepares the same; tokenizer: it is being trained; tokenize: shards are being written."""
    fraction: float | None
    """Share that is done, or None where the size of the source is unknown."""
    documents: int
    num_bytes: int
    """UTF-8 bytes of text so far."""
    tokens: int


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class Part:
    """One source of a prepared corpus."""

    name: str
    """As in `data.mixture`; empty where the corpus has one source."""
    share: float
    """Of the training tokens; the parts' shares add up to one."""
    folder: Path
    train: TokenDataset
    validation: TokenDataset


@dataclass(frozen=True)
class PreparedData:
    """A corpus that is ready to train on. That of a mixture is its sources' laid end to end."""

    folder: Path
    """Of a mixture, the folder of its first source."""
    manifest: Manifest
    train: TokenDataset
    validation: TokenDataset
    parts: tuple[Part, ...]
    """One a source."""

    @property
    def tokenizer_path(self) -> Path:
        """Its own copy of the tokenizer."""
        return self.folder / TOKENIZER

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.manifest.vocab_size

    @property
    def eos_id(self) -> int:
        """The separator before each document."""
        return self.manifest.eos_id

    @property
    def tokenizer_hash(self) -> str:
        """sha256 of the tokenizer's definition."""
        return self.manifest.tokenizer_hash

    @property
    def corpus_key(self) -> str:
        """Name in the cache: source, tokenizer and settings. Depends on times of files."""
        return self.manifest.key

    @property
    def content_hash(self) -> str:
        """sha256 of the tokens of all splits: equal wherever the same corpus was prepared."""
        return self.manifest.content_hash


@dataclass(frozen=True)
class _Plan:
    """What is to be prepared, and under which name."""

    config: DataConfig
    source: Source
    validation: Source | None
    key: str
    tokenizer_key: str

    @property
    def cache(self) -> Path:
        return Path(self.config.cache_dir)


def prepare(config: DataConfig, progress: ProgressCallback | None = None) -> PreparedData:
    """The corpus that `config` describes, prepared now if it is not in `data.cache_dir` yet.

    Several processes may call this at once: one works, the others wait for it. `progress` is called a few times a
    second, on the calling thread; what it raises ends the call, and the next one goes on from there. Raises DataError
    for all that a user can change.
    """
    if config.mixture:
        return _prepare_mixture(config, progress or _ignore)
    report = progress or _ignore
    plan = _plan(config)
    folder = plan.cache / plan.key
    if not (folder / MANIFEST).is_file():
        with _disk_errors(plan.cache), _locked(plan.cache / f"{plan.key}.lock", report):
            if not (folder / MANIFEST).is_file():  # another process may have made it while this one waited
                _build(plan, folder, report)
    return open_prepared(folder)


def open_prepared(folder: Path, verify: bool = False) -> PreparedData:
    """A prepared corpus by its folder. Sizes of all files are checked, with `verify` their checksums as well.

    Raises DataError naming the damaged file.
    """
    manifest = Manifest.read(folder)
    if manifest.format != FORMAT:
        raise DataError(
            f"{folder} has format {manifest.format}, this version reads {FORMAT}. Prepare the corpus again."
        )
    if manifest.dtype != token_dtype(manifest.vocab_size):
        raise damaged(folder / MANIFEST, f"dtype {manifest.dtype} for a vocabulary of {manifest.vocab_size}")
    train, validation = (
        TokenDataset(folder / name, manifest.splits[name], manifest.dtype, manifest.vocab_size) for name in SPLITS
    )
    if verify:
        train.verify()
        validation.verify()
    return PreparedData(folder, manifest, train, validation, (Part("", 1.0, folder, train, validation),))


def _prepare_mixture(config: DataConfig, report: ProgressCallback) -> PreparedData:
    """Every source of `data.mixture` prepared by itself, and laid end to end."""
    tokenizer = config.tokenizer
    if tokenizer == "train":
        tokenizer = str(prepare_tokenizer(config, report))
    configs = source_configs(config, tokenizer)
    meter = _MixtureMeter(len(configs), report)
    sources = [prepare(source, meter.of_source(index)) for index, source in enumerate(configs)]
    names = [entry.name for entry in config.mixture]
    first = sources[0]
    train = MixedDataset(names, [entry.weight for entry in config.mixture], [source.train for source in sources])
    validation = TokenDataset(first.folder, SplitInfo(), first.manifest.dtype, first.vocab_size)
    for source in sources:
        validation.extend(source.validation)
    keys = {name: source.corpus_key for name, source in zip(names, sources, strict=True)}
    key = f"mixture-{_hash({'sources': list(keys.items())})}"
    about = {name: source.manifest.source for name, source in zip(names, sources, strict=True)}
    splits = {"train": train.info, "validation": validation.info}
    manifest = replace(first.manifest, key=key, source=about, settings={"shares": train.shares}, splits=splits)
    parts = tuple(
        Part(name, share, source.folder, source.train, source.validation)
        for name, share, source in zip(names, train.shares, sources, strict=True)
    )
    return PreparedData(first.folder, manifest, train, validation, parts)


def prepare_tokenizer(config: DataConfig, progress: ProgressCallback | None = None) -> Path:
    """The file of the tokenizer that `config` describes, trained or fetched now if it is not in the cache yet.

    That of a mixture is trained on as much text of each source, whatever the weights.
    """
    plans = [_plan(source) for source in (source_configs(config, config.tokenizer) if config.mixture else [config])]
    key = plans[0].tokenizer_key
    if config.mixture and config.tokenizer == "train":
        key = f"mixture-{_hash({'tokenizers': [plan.tokenizer_key for plan in plans]})}"
    with _disk_errors(plans[0].cache):
        return _tokenizer(plans, key, progress or _ignore)


def load_tokenizer(prepared: PreparedData) -> Tokenizer:
    """The tokenizer of a prepared corpus. Raises DataError where the file can't be read or has another vocabulary.

    One of the same vocabulary, but another definition, is a warning: it decodes, and may only be of another version.
    """
    path, manifest = prepared.tokenizer_path, prepared.manifest
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for what it can't parse
        raise damaged(path, str(error)) from error
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if vocabulary.get(manifest.eos_token) != manifest.eos_id or max(vocabulary.values()) + 1 != manifest.vocab_size:
        raise damaged(path, "it has another vocabulary than the corpus was prepared with")
    if inspect_tokenizer(tokenizer, manifest.eos_token).hash != manifest.tokenizer_hash:
        _LOG.warning(f"{path} is not the tokenizer that the corpus was prepared with, or another version wrote it")
    return tokenizer


def _ignore(_: Progress) -> None:
    pass


def _plan(config: DataConfig) -> _Plan:
    """Opens the sources and derives the keys."""
    if not 0 <= config.validation_fraction < 1:
        raise DataError(f"data.validation_fraction={config.validation_fraction} must be in [0, 1).")
    if config.shard_tokens < 2:
        raise DataError(f"data.shard_tokens={config.shard_tokens} must be at least 2.")
    if config.source is Kind.mixture:
        raise DataError(EMPTY)
    source, validation = open_sources(config)
    corpus = {
        "format": FORMAT,
        "source": source.identity(),
        "validation": validation.identity() if validation else config.validation_fraction,
        "max_documents": config.max_documents,
    }
    if config.tokenizer == "train":
        tokenizer = {"train": config.tokenizer_vocab_size, "corpus": corpus}
    else:
        tokenizer = {"tokenizer": tokenizer_identity(config.tokenizer)}
    name = config.source.value
    key = f"{name}-{_hash({'corpus': corpus, 'tokenizer': tokenizer, 'shard_tokens': config.shard_tokens})}"
    return _Plan(
        config, source, validation, key, f"{name if config.tokenizer == 'train' else 'given'}-{_hash(tokenizer)}"
    )


def _hash(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path, report: ProgressCallback) -> Iterator[None]:
    """Holds a lock file; the system releases it when its holder dies, however that happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    patience_s = 0.0
    while not lock.is_locked:
        try:
            lock.acquire(timeout=patience_s)
        except Timeout:
            report(Progress("wait", None, 0, 0, 0))
            patience_s = REPORT_INTERVAL_S
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _disk_errors(cache: Path) -> Iterator[None]:
    """Turns a full disk or a folder that can't be written into a DataError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"data.cache_dir={cache}: no space left. What was finished is kept; make room, or name another folder."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise DataError(f"data.cache_dir={cache} can't be written: {error}") from error
        raise


# Tokenizer


def _tokenizer(plans: Sequence[_Plan], key: str, report: ProgressCallback) -> Path:
    """The tokenizer of one corpus, or of several that share it."""
    path = plans[0].cache / "tokenizers" / key / TOKENIZER
    if not path.is_file():
        with _locked(path.parent.with_suffix(".lock"), report):
            if not path.is_file():  # another process may have made it while this one waited
                _make_tokenizer(plans, path, report)
    return path


def _make_tokenizer(plans: Sequence[_Plan], path: Path, report: ProgressCallback) -> None:
    config = plans[0].config
    if config.tokenizer == "train":
        meter = _MixtureMeter(len(plans), report)
        budget = TOKENIZER_SAMPLE_CHARS // len(plans)
        texts = chain.from_iterable(
            _sample(plan, _holdout_threshold(plan), budget, meter.of_source(index)) for index, plan in enumerate(plans)
        )
        tokenizer, separator = train_tokenizer(texts, config.tokenizer_vocab_size), None
    else:
        tokenizer, separator = fetch_tokenizer(config.tokenizer, plans[0].cache)
    info = inspect_tokenizer(tokenizer, separator)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    write_synced(path.with_name(SEPARATOR), json.dumps({"eos_token": info.eos_token}).encode())
    save_tokenizer(tokenizer, path)


def _remove_leftovers(folder: Path) -> None:
    """Deletes what a process that was killed while writing has left; called by the holder of the lock."""
    for path in folder.glob("*.tmp"):
        path.unlink()


def _open_tokenizer(path: Path) -> TokenizerInfo:
    separator = json.loads(path.with_name(SEPARATOR).read_text("utf-8"))["eos_token"]
    return inspect_tokenizer(Tokenizer.from_file(str(path)), separator)


def _sample(plan: _Plan, threshold: int, budget: int, report: ProgressCallback) -> Iterator[str]:
    """About `budget` characters of the training split to train a tokenizer on, spread over the source."""
    meter = _Meter("tokenizer", report)
    limit = plan.config.max_documents
    num_parts = plan.source.num_parts() if limit is None else 1
    for index in range(num_parts):
        share = budget // (num_parts - index)  # what a short part leaves, the later ones may use
        reader = plan.source.read() if num_parts == 1 else plan.source.read_part(index)
        for batch in batches(reader, limit):
            for text in batch.texts:
                data = text.encode()
                if data and text_hash(data) >= threshold:
                    meter.add(1, len(data), 0, batch.fraction)
                    yield text
            num_chars = sum(map(len, batch.texts))
            share -= num_chars
            budget -= num_chars
            if share <= 0:
                break
    meter.close()


def _holdout_threshold(plan: _Plan) -> int:
    """Documents whose 64-bit hash is below this are held out: about `validation_fraction` of them.

    In a small corpus that fraction may be no document at all, or all: then the threshold moves so far that the one with
    the smallest (largest) hash is held out (kept). Stops reading as soon as there is one of each.
    """
    if plan.validation is not None or plan.config.validation_fraction == 0:
        return 0
    wanted = int(plan.config.validation_fraction * HASH_RANGE)
    smallest, largest, count, read = HASH_RANGE, -1, 0, 0
    for batch in batches(plan.source.read(), plan.config.max_documents):
        read += len(batch.texts)
        for text in filter(None, batch.texts):
            value = text_hash(text.encode())
            smallest, largest, count = min(smallest, value), max(largest, value), count + 1
        if smallest < wanted <= largest:
            return wanted
        if count >= HOLDOUT_PROBE_DOCUMENTS:
            break
    if count == 0:
        raise _no_text(plan.source, read)
    if smallest == largest:
        raise DataError(
            f"{plan.source.description()} holds a single document, so that none can be held out for validation. "
            "Add documents, or set data.validation_fraction=0 and train.eval_every=0."
        )
    return smallest + 1 if smallest >= wanted else largest


def _no_text(source: Source, documents: int) -> DataError:
    problem = f"all of its {documents} documents are empty" if documents else "it has no documents"
    return DataError(f"{source.description()} holds no text: {problem}.")


# Shards


@dataclass
class _State:
    """How far an unfinished corpus is; all of it is in state.json."""

    threshold: int
    stream: int = 0
    """0: the corpus; 1: the validation split, where it is a source of its own."""
    cursor: Cursor = field(default_factory=dict)
    documents: int = 0
    """Documents read from this stream, empty ones included."""
    total_documents: int = 0
    """Documents read from both."""
    commit: str | None = None
    """The hub's commit that is being read."""
    writers: dict[str, Any] = field(default_factory=dict)


def _build(plan: _Plan, folder: Path, report: ProgressCallback) -> None:
    """Prepares the corpus in `folder`, going on from what an earlier call has finished."""
    if folder.exists():
        raise damaged(folder / MANIFEST, "missing")
    partial = folder.with_name(f"{folder.name}.partial")
    tokenizer_path = _tokenizer([plan], plan.tokenizer_key, report)
    info = _open_tokenizer(tokenizer_path)
    state = _load_state(partial, info)
    if state is None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        state = _State(_holdout_threshold(plan))
    write_synced(partial / TOKENIZER, tokenizer_path.read_bytes())
    splits = _tokenize(plan, info, partial, state, report)
    _check_splits(plan, splits, state)
    source = {**plan.source.identity(), **({"commit": state.commit} if state.commit else {})}
    settings = {
        "text_key": plan.config.text_key,
        "max_documents": plan.config.max_documents,
        "shard_tokens": plan.config.shard_tokens,
        "holdout_threshold": state.threshold,
        "validation": plan.validation.identity() if plan.validation else plan.config.validation_fraction,
    }
    dtype = token_dtype(info.vocab_size)
    manifest = Manifest(
        plan.key, source, settings, info.hash, info.vocab_size, info.eos_token, info.eos_id, dtype, splits
    )
    manifest.write(partial)
    (partial / STATE).unlink(missing_ok=True)
    _publish(partial, folder)


def _publish(partial: Path, folder: Path) -> None:
    """Makes the finished corpus appear under its name."""
    _remove_leftovers(partial)
    sync_folder(partial)
    os.rename(partial, folder)
    sync_folder(folder.parent)


def _tokenize(
    plan: _Plan, info: TokenizerInfo, partial: Path, state: _State, report: ProgressCallback
) -> dict[str, SplitInfo]:
    dtype = token_dtype(info.vocab_size)
    sources = [plan.source, *([plan.validation] if plan.validation else [])]
    encoder = Encoder(partial / TOKENIZER, info, dtype, plan.config.shard_tokens, plan.config.num_workers)
    meter = _Meter("tokenize", report)
    with ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for name in SPLITS:
            writers[name] = ShardWriter(partial / name, dtype, plan.config.shard_tokens, state.writers.get(name))
            stack.callback(writers[name].close)
            meter.add(writers[name].total_documents, writers[name].info.num_bytes, writers[name].total_tokens, None)
        stack.enter_context(encoder)
        while state.stream < len(sources):
            threshold = HASH_RANGE if state.stream else state.threshold
            _tokenize_stream(plan, sources[state.stream], threshold, encoder, writers, partial, state, meter)
            state.stream, state.cursor, state.documents = state.stream + 1, {}, 0
            _save_state(partial, state, writers)
        meter.close()
        return {name: writer.finish() for name, writer in writers.items()}


def _tokenize_stream(
    plan: _Plan,
    source: Source,
    threshold: int,
    encoder: Encoder,
    writers: dict[str, ShardWriter],
    partial: Path,
    state: _State,
    meter: _Meter,
) -> None:
    """Appends the rest of one source to the shards; saves the state when a shard is finished or time has passed."""
    limit = plan.config.max_documents
    remaining = None if limit is None else limit - state.documents
    saved, shards = time.monotonic(), sum(len(writer.info.shards) for writer in writers.values())
    for encoded in encoder.encode(batches(source.read(state.cursor), remaining)):
        _route(encoded, threshold, writers)
        state.cursor = encoded.batch.cursor
        state.commit = state.cursor.get("commit") if state.stream == 0 else state.commit
        state.documents += len(encoded.batch.texts)
        state.total_documents += len(encoded.batch.texts)
        meter.add(len(encoded.lengths), int(encoded.num_bytes.sum()), len(encoded.tokens), encoded.batch.fraction)
        finished = sum(len(writer.info.shards) for writer in writers.values())
        if finished != shards or time.monotonic() - saved > STATE_INTERVAL_S:
            _save_state(partial, state, writers)
            saved, shards = time.monotonic(), finished


def _route(encoded: Encoded, threshold: int, writers: dict[str, ShardWriter]) -> None:
    """Each document to its split."""
    if threshold in (0, HASH_RANGE):
        held = np.full(len(encoded.hashes), threshold == HASH_RANGE)
    else:
        held = encoded.hashes < np.uint64(threshold)
    for name, mask in (("train", ~held), ("validation", held)):
        if mask.any():
            tokens = encoded.tokens[np.repeat(mask, encoded.lengths)]
            writers[name].append(tokens, encoded.lengths[mask], int(encoded.num_bytes[mask].sum()))


def _check_splits(plan: _Plan, splits: dict[str, SplitInfo], state: _State) -> None:
    """Raises DataError where a split has no document."""
    if not splits["train"].num_tokens and not splits["validation"].num_tokens:
        raise _no_text(plan.source, state.total_documents)
    wants_validation = plan.validation is not None or plan.config.validation_fraction > 0
    for name in SPLITS if wants_validation else ("train",):
        if not splits[name].num_tokens:
            raise DataError(
                f"The {name} split of {plan.source.description()} has no documents. "
                "Add documents that differ, or change data.validation_fraction or data.validation_split."
            )


def _save_state(partial: Path, state: _State, writers: dict[str, ShardWriter]) -> None:
    """Records how far source and shards are; the shards' files are synced first."""
    state.writers = {name: writer.state() for name, writer in writers.items()}
    write_synced(partial / STATE, json.dumps(asdict(state)).encode())


def _load_state(partial: Path, info: TokenizerInfo) -> _State | None:
    """Where a killed preparation was, or None where there is nothing to go on from."""
    tokenizer = partial / TOKENIZER
    if not (partial / STATE).is_file() or not tokenizer.is_file():
        return None
    if inspect_tokenizer(Tokenizer.from_file(str(tokenizer)), info.eos_token).hash != info.hash:
        return None  # the hub's tokenizer of this name has changed since
    state = _State(**json.loads((partial / STATE).read_text("utf-8")))
    dtype = token_dtype(info.vocab_size)
    complete = all(can_resume(partial / name, dtype, writer) for name, writer in state.writers.items())
    return state if complete else None


class _Meter:
    """Adds up what was done and reports it a few times a second."""

    def __init__(self, stage: Literal["tokenizer", "tokenize"], report: ProgressCallback) -> None:
        self.stage, self.report = stage, report
        self.documents = self.num_bytes = self.tokens = 0
        self.last = 0.0

    def add(self, documents: int, num_bytes: int, tokens: int, fraction: float | None) -> None:
        """Counts what is new; `fraction` is the share done with it."""
        self.documents += documents
        self.num_bytes += num_bytes
        self.tokens += tokens
        if time.monotonic() - self.last > REPORT_INTERVAL_S:
            self.last = time.monotonic()
            self._report(fraction)

    def close(self) -> None:
        """Reports the end."""
        self._report(1.0)

    def _report(self, fraction: float | None) -> None:
        self.report(Progress(self.stage, fraction, self.documents, self.num_bytes, self.tokens))


class _MixtureMeter:
    """Makes one progress of those of several sources that are worked on one after the other."""

    def __init__(self, num_sources: int, report: ProgressCallback) -> None:
        self.num_sources, self.report = num_sources, report
        self.latest = Progress("wait", None, 0, 0, 0)

    def of_source(self, index: int) -> ProgressCallback:
        """The callback for one of them, to be called after those before it are done."""
        before: Progress | None = None

        def update(progress: Progress) -> None:
            nonlocal before
            if progress.stage == "wait":
                self.report(progress)
                return
            before = before or self.latest
            fraction = None if progress.fraction is None else (index + progress.fraction) / self.num_sources
            self.latest = Progress(
                progress.stage,
                fraction,
                before.documents + progress.documents,
                before.num_bytes + progress.num_bytes,
                before.tokens + progress.tokens,
            )
            self.report(self.latest)

        return update
