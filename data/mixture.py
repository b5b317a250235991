"""Several prepared corpora as one: shares of the training tokens, validation apart.

Every source is prepared by itself, with a tokenizer that all share, so that changing a weight prepares nothing anew.
The mixture is arithmetic over the sources' token streams laid end to end (`data.order.MixtureOrder`): the position in
it is one integer as in a single corpus, and how many tokens each source has given follows from it exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from configs.schema import DataConfig, Source
from data.errors import DataError
from data.order import BLOCK, MixtureOrder, RowOrder, SampleOrder, quotas
from data.packing import Packing, join, pack_dataset
from data.shards import SplitInfo, TokenDataset


class MixedDataset(TokenDataset):
    """The training splits of several corpora, end to end, and how much of each to train on."""

    def __init__(self, names: Sequence[str], weights: Sequence[float], parts: Sequence[TokenDataset]) -> None:
        """`weights` need not add up to one. The parts have the same dtype."""
        super().__init__(Path(), SplitInfo(), parts[0].dtype.str, parts[0].vocab_size)
        for part in parts:
            self.extend(part)
        self.names, self.parts = tuple(names), tuple(parts)
        self.quotas = quotas(weights)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the training tokens that each source gives, rounded as the order rounds it."""
        return tuple(quota / BLOCK for quota in self.quotas)

    def order(self, sequence_length: int, seed: int, shuffle: bool) -> MixtureOrder:
        """The order of its samples. Raises DataError where a source is shorter than one sample."""
        orders = [SampleOrder(part.num_tokens, sequence_length, seed, shuffle) for part in self.parts]
        for name, order in zip(self.names, orders, strict=True):
            if order.samples_per_epoch == 0:
                raise DataError(
                    f"Source {name} of data.mixture has {order.num_tokens} training tokens, fewer than one sample of "
                    f"model.sequence_length={sequence_length} + 1. Give it more text, or leave it out."
                )
        return MixtureOrder(tuple(orders), self.quotas, seed)

    def packed(self, sequence_length: int, seed: int, shuffle: bool) -> tuple[Packing, MixtureOrder]:
        """The rows of all sources, none of which holds tokens of two, and their order."""
        packings = [pack_dataset(part, sequence_length) for part in self.parts]
        for name, packing in zip(self.names, packings, strict=True):
            if packing.num_rows == 0:
                raise DataError(f"Source {name} of data.mixture has no training tokens. Give it text, or leave it out.")
        orders = tuple(RowOrder(packing.num_rows, seed, shuffle) for packing in packings)
        return join(packings, [part.num_tokens for part in self.parts]), MixtureOrder(orders, self.quotas, seed)


def source_configs(config: DataConfig, tokenizer: str) -> list[DataConfig]:
    """A config of its own for each source of `data.mixture`, all with one tokenizer. Raises DataError."""
    check_mixture(config)
    return [
        replace(
            config,
            mixture=[],
            tokenizer=tokenizer,
            source=entry.source,
            **{key: getattr(entry, key) for key in OF_A_SOURCE},
        )
        for entry in config.mixture
    ]


OF_A_SOURCE = ("path", "subset", "revision", "split", "validation_split", "text_key")
"""Keys of `DataConfig` that an entry of `data.mixture` has for itself."""
EMPTY = (
    "data.mixture is empty, and data=mixture has no other source: list what to mix, as in "
    "data.mixture='[{name: code, source: stdlib}, {name: own, source: text, path: FOLDER}]', or leave data=mixture out."
)
"""What is wrong with a mixture of nothing."""


def check_mixture(config: DataConfig) -> None:
    """Raises DataError for names and weights that can't be, and for keys that only a corpus of one source reads."""
    defaults = DataConfig()
    for key in OF_A_SOURCE:
        value = getattr(config, key)
        if value != getattr(defaults, key):
            raise DataError(
                f"data.{key}={value} is not read beside data.mixture: give it to each of its sources ({{name: ..., "
                f"{key}: {value}}})."
            )
    names = [entry.name for entry in config.mixture]
    for index, entry in enumerate(config.mixture):
        where = f"data.mixture[{index}]"
        if not re.fullmatch(r"[a-z0-9_-]+", entry.name):
            raise DataError(f"{where}.name is {entry.name!r}: give lower-case letters, digits, _ and -.")
        if names.index(entry.name) != index:
            raise DataError(f"{where}.name={entry.name} is there twice: metrics need a name for each source.")
        if not (math.isfinite(entry.weight) and entry.weight > 0):
            raise DataError(f"{where}.weight={entry.weight} must be above 0; leave the source out for none of it.")
        if entry.source is Source.mixture:
            raise DataError(f"{where}.source=mixture: a source can't be a mixture itself. List its sources here.")
        if entry.source is Source.stdlib and entry.path is not None:
            raise DataError(f"{where}.path={entry.path} is not read: source stdlib has none. Give another source.")
        if entry.source is not Source.hub and entry.validation_split is not None:
            raise DataError(f"{where}.validation_split is for source hub: use data.validation_fraction.")
    for entry, quota in zip(config.mixture, quotas([entry.weight for entry in config.mixture]), strict=True):
        if quota == 0:
            raise DataError(
                f"data.mixture: the weight {entry.weight} of {entry.name} is less than 1/{BLOCK} of all weights, the "
                "smallest share there is. Raise it, or leave the source out."
            )
