"""Where documents come from: streaming readers over the standard library, local files and the Hugging Face hub."""

from __future__ import annotations

from configs.schema import DataConfig
from configs.schema import Source as Kind
from data.errors import DataError
from data.sources.base import Cursor, Reader, Source
from data.sources.files import FileSource, JsonlSource, ParquetSource, TextSource
from data.sources.hub import HubSource, StdlibSource

__all__ = ["Cursor", "Reader", "Source", "open_sources"]

_FILE_SOURCES: dict[Kind, type[FileSource]] = {
    Kind.text: TextSource,
    Kind.jsonl: JsonlSource,
    Kind.parquet: ParquetSource,
}


def open_sources(config: DataConfig) -> tuple[Source, Source | None]:
    """The corpus that `config` names, and the one to validate on where that is a split of its own.

    Reads names and sizes of files, not their content (but for `stdlib`), and never the network. Raises DataError.
    """
    if config.source is Kind.stdlib:
        return StdlibSource(), None
    if not config.path:
        wanted = "a dataset's name (owner/name)" if config.source is Kind.hub else "a file, a folder or a glob"
        raise DataError(f"data.path is not set: data={config.source.value} needs {wanted}.")
    if config.source is Kind.hub:
        validation = HubSource(config, config.validation_split) if config.validation_split else None
        return HubSource(config, config.split), validation
    return _FILE_SOURCES[config.source](config.path, config.text_key), None
