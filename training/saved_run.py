"""What a run left behind, for tools that use it: a checkpoint, the config it was trained with, its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer

from configs import to_dataclass
from configs.errors import UserError
from configs.schema import ModelConfig, RunConfig
from data import prepare_tokenizer
from data.tokenizer import TokenizerInfo, fetch_tokenizer, inspect_tokenizer
from training.checkpoint import CheckpointError, Manifest, find_checkpoint, read_manifest
from training.run import TOKENIZER
from training.shards import CorruptError


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint and all that is needed to use its weights."""

    checkpoint: Path
    manifest: Manifest
    model: ModelConfig
    """Complete: the vocabulary is the one that was trained."""
    tokenizer_path: Path
    tokenizer: Tokenizer
    info: TokenizerInfo


def open_saved(source: Path, tokenizer: Path | None = None) -> SavedRun:
    """The newest checkpoint of a run folder, or the one that `source` is, and the tokenizer it was trained with.

    tokenizer: a tokenizer.json or its folder. None: the copy in the run folder, else what the run's `data.*` keys make.
    Raises `UserError` for a checkpoint that isn't there or is damaged, and for another tokenizer than the run's.
    """
    checkpoint = find_checkpoint(source)
    try:
        manifest = read_manifest(checkpoint)
    except CorruptError as error:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {error}") from error
    composed = OmegaConf.merge(OmegaConf.structured(RunConfig), manifest.config)
    assert isinstance(composed, DictConfig)
    config = to_dataclass(composed, "config")
    path = tokenizer or beside(checkpoint) or prepare_tokenizer(config.data)
    path = path / TOKENIZER if path.is_dir() else path
    loaded, separator = fetch_tokenizer(str(path), Path(config.data.cache_dir))
    info = inspect_tokenizer(loaded, separator)
    if info.hash != manifest.tokenizer_hash:
        raise UserError(f"{path} is not the tokenizer this run was trained with; give its file with --tokenizer")
    model = replace(config.model, vocab_size=config.model.vocab_size or info.vocab_size)
    return SavedRun(checkpoint, manifest, model, path, loaded, info)


def beside(checkpoint: Path) -> Path | None:
    """The tokenizer that a run keeps beside its checkpoints, if it does."""
    places = (checkpoint.resolve().parent, checkpoint.resolve().parent.parent)
    return next((place / TOKENIZER for place in places if (place / TOKENIZER).is_file()), None)
