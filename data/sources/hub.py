"""Sources read through Hugging Face `datasets`: the standard library's own files, and any dataset of the hub."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import threading
import urllib.error
import urllib.request
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from configs.schema import DataConfig
from data.errors import DataError
from data.sources.base import Cursor, Reader, Source, missing_text_key, text_of
from data.sources.files import files_hash, folder_files

if TYPE_CHECKING:
    import datasets

STDLIB_TABLES = frozenset({"encodings", "pydoc_data"})
"""Code pages and the text of `help()`: a fifth of the library's bytes, and hardly a line of code."""
STDLIB_SKIP = STDLIB_TABLES | {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "__pycache__"}
PROBE_TIMEOUT_S = 8.0
HUB_TIMEOUT_S = 300.0
"""For opening a dataset, which takes minutes where it has tens of thousands of files, or fetching a tokenizer."""
STREAM_RETRIES = 3
"""Of a read that fails while documents are streamed: each is a minute and a half of the client's own retries."""
WITHOUT_HUB = (
    "Call again to go on from here, prepare it with a network, or use local files (data=text|jsonl|parquet "
    "data.path=...)."
)
T = TypeVar("T")


class Opened(NamedTuple):
    """A dataset at its beginning."""

    dataset: datasets.IterableDataset
    num_rows: int | None
    """Rows, where that is known."""
    commit: str | None
    """The hub's commit; goes into the cursor, so that a preparation never mixes two."""


class DatasetSource(Source):
    """A `datasets.IterableDataset` and the column of its text."""

    text_key: str

    @abstractmethod
    def open(self, cursor: Cursor) -> Opened:
        """The dataset that `cursor` belongs to."""

    def read(self, cursor: Cursor | None = None) -> DatasetReader:
        return DatasetReader(self, cursor or {})


class DatasetReader(Reader):
    """A pass over a streamed dataset; the cursor is the state that `datasets` keeps for resuming."""

    def __init__(self, source: DatasetSource, cursor: Cursor) -> None:
        self.source = source
        self.row = int(cursor.get("row", 0))
        self.dataset, self.num_rows, self.commit = source.open(cursor)
        if cursor.get("state") is not None:
            self.dataset.load_state_dict(cursor["state"])

    def __iter__(self) -> Iterator[str]:
        where = self.source.description()
        with hub_errors(where):
            for record in self.dataset:
                self.row += 1
                yield text_of(record, self.source.text_key, f"{where}, row {self.row}")

    def cursor(self) -> Cursor:
        return {"row": self.row, "commit": self.commit, "state": self.dataset.state_dict() if self.row else None}

    def fraction(self) -> float | None:
        return min(self.row / self.num_rows, 1.0) if self.num_rows else None


class StdlibSource(DatasetSource):
    """The Python standard library's own `.py` files, without tests and tables: text that is always there."""

    text_key = "text"

    def __init__(self) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        self.texts = [path.read_text("utf-8") for path in stdlib_files(root)]
        if not self.texts:
            raise DataError(
                f"data.source=stdlib found no .py files in {root}, where this Python keeps its standard library. "
                "Train on text of your own with data=text data.path=FOLDER."
            )

    def identity(self) -> dict[str, Any]:
        """By content, so that machines with the same Python share a key."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        return {"source": "stdlib", "content": digest.hexdigest()}

    def description(self) -> str:
        return f"the standard library of Python {sys.version_info.major}.{sys.version_info.minor}"

    def open(self, cursor: Cursor) -> Opened:
        import datasets

        # From memory: a generator dataset would leave lock files in the user's Hugging Face cache.
        dataset = datasets.Dataset.from_dict({"text": self.texts})
        return Opened(dataset.to_iterable_dataset(), len(self.texts), None)


def stdlib_files(root: Path) -> list[Path]:
    """The library's `.py` files in the order of their names, without what `STDLIB_SKIP` names."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in STDLIB_SKIP]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


class HubSource(DatasetSource):
    """A dataset of the hub, or a local folder that `datasets.load_dataset` understands; never a dataset's own code."""

    def __init__(self, config: DataConfig, split: str) -> None:
        assert config.path is not None, "checked by open_sources"
        self.path, self.subset, self.revision, self.split = config.path, config.subset, config.revision, split
        self.text_key = config.text_key
        self.local = Path(self.path).is_dir()
        self.cache_dir = Path(config.cache_dir) / "hub"

    def identity(self) -> dict[str, Any]:
        """By name and revision, without asking the hub: what has been prepared is used without a network, and stays
        what it was when the newest revision changes."""
        identity = {"source": "hub", "path": self.path, "subset": self.subset, "split": self.split}
        identity["text_key"] = self.text_key
        if self.local:
            return {**identity, "files": files_hash(folder_files(Path(self.path)))}
        return {**identity, "revision": self.revision}

    def description(self) -> str:
        subset = f", subset {self.subset}" if self.subset else ""
        return f"data.path={self.path} (hub{subset}, split {self.split})"

    def open(self, cursor: Cursor) -> Opened:
        if self.local:
            return self._open(cursor)
        probe_hub(self.description(), f"datasets/{self.path}")
        return within_time(self.description(), lambda: self._open(cursor))

    def _open(self, cursor: Cursor) -> Opened:
        import datasets
        from datasets import load_dataset

        datasets.config.STREAMING_READ_MAX_RETRIES = STREAM_RETRIES
        with hub_errors(self.description()):
            commit = cursor.get("commit") or (None if self.local else self._newest_commit())
            dataset = load_dataset(
                self.path,
                self.subset,
                split=self.split,
                revision=commit,
                streaming=True,
                cache_dir=str(self.cache_dir),
            )
            columns = list(dataset.column_names or next(iter(dataset)))
        if self.text_key not in columns:
            raise missing_text_key(self.text_key, columns, self.description())
        split = (dataset.info.splits or {}).get(self.split)
        return Opened(dataset, split.num_examples if split is not None else None, commit)

    def _newest_commit(self) -> str | None:
        """The commit that the revision stands for now."""
        from huggingface_hub import HfApi

        return HfApi().dataset_info(self.path, revision=self.revision).sha


def probe_hub(what: str, route: str) -> None:
    """Raises DataError within seconds where the hub can't be reached; its own client retries for minutes.

    `route` is what will be asked for, below the hub's `/api/`; any answer will do.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise DataError(f"{what} is not prepared yet, and HF_HUB_OFFLINE is set.")
    request = urllib.request.Request(f"{constants.ENDPOINT}/api/{route}", method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answered
    except OSError as error:
        raise DataError(
            f"{what} needs the Hugging Face hub, and {constants.ENDPOINT} can't be reached ({error}). {WITHOUT_HUB}"
        ) from error


def within_time(what: str, ask: Callable[[], T]) -> T:
    """What `ask` returns or raises. Raises DataError after `HUB_TIMEOUT_S`: many calls of the client have no limit."""
    answers: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            answers.put((None, error))

    threading.Thread(target=run, name="hub", daemon=True).start()  # a call that hangs doesn't keep the process
    try:
        answer, error = answers.get(timeout=HUB_TIMEOUT_S)
    except Empty:
        raise DataError(f"{what}: the Hugging Face hub gave no answer for {HUB_TIMEOUT_S:g} s. {WITHOUT_HUB}") from None
    if error is not None:
        raise error
    return cast(T, answer)


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns what `datasets` and the hub's client raise into a DataError that names the dataset."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's client has changed its HTTP library before; the first base of its error is that library's own.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except (DatasetsError, HfHubHTTPError, http_error, OSError, ValueError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[:1]
        raise DataError(f"{what} can't be read: {type(error).__name__}: {''.join(first_line)}") from error
