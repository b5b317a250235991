"""Mixtures: exact shares, one integer as position, the same batches on any number of ranks, sources told apart."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import compose
from configs.errors import UserError
from configs.schema import DataConfig, MixtureSource, Source
from data import DataError, PreparedData, Progress, TokenLoader, load_tokenizer, prepare, prepare_tokenizer
from data.order import BLOCK, MixtureOrder, SampleOrder, quotas
from tests.data.conftest import jsonl_config, write_jsonl

S = 16
ALPHABETS = {"big": "abcdef", "small": "UVWXYZ", "digits": "012345"}


def write_texts(name: str, count: int) -> list[str]:
    """Documents of 5 to 80 words of a source's own letters."""
    rng = random.Random(name)
    words = ["".join(rng.choices(ALPHABETS[name], k=4)) for _ in range(8)]
    return [" ".join(rng.choices(words, k=rng.randint(5, 80))) for _ in range(count)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Three sources of different sizes and letters; the third has its text under another key."""
    folder = tmp_path_factory.mktemp("mixture")
    big = write_jsonl(folder / "big.jsonl", write_texts("big", 160))
    small = write_jsonl(folder / "small.jsonl", write_texts("small", 60))
    digits = write_jsonl(folder / "digits.jsonl", write_texts("digits", 60), key="body")
    mixture = [
        MixtureSource("big", 2.0, Source.jsonl, str(big)),
        MixtureSource("small", 1.0, Source.jsonl, str(small)),
        MixtureSource("digits", 1.0, Source.jsonl, str(digits), text_key="body"),
    ]
    config = jsonl_config(big, folder / "cache", mixture=mixture)
    config.source, config.path = Source.stdlib, None
    return config


@pytest.fixture(scope="module")
def mixed(config: DataConfig) -> PreparedData:
    """These sources, prepared."""
    return prepare(config)


def loader(corpus: PreparedData, world_size: int = 1, rank: int = 0, **changes: object) -> TokenLoader:
    """Batches of eight sequences, two a micro-batch."""
    settings = {"sequence_length": S, "global_batch_size": 8, "micro_batch_size": 2, "seed": 5, "prefetch": 0}
    return TokenLoader(corpus.train, rank=rank, world_size=world_size, **{**settings, **changes})  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
def test_quotas(weights: list[float]) -> None:
    """They add up, and none is off by one or more."""
    parts = quotas(weights)
    assert sum(parts) == BLOCK
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - BLOCK * weight / sum(weights)) < 1 + 1e-6


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(20 * S, 9000), min_size=1, max_size=4),
    seed=st.integers(0, 2**63),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_every_source_hands_out_its_own_samples_in_its_own_order(
    sizes: list[int], seed: int, shuffle: bool, data: st.DataObject
) -> None:
    """Over several epochs and blocks, none skipped and none twice, counted exactly at every position."""
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    orders = tuple(SampleOrder(size, S, seed, shuffle) for size in sizes)
    mixture = MixtureOrder(orders, quotas(weights), seed)
    position = data.draw(st.integers(0, 3 * BLOCK))
    count = data.draw(st.integers(0, BLOCK))
    starts = mixture.starts(position, count)
    bounds = np.cumsum([0, *sizes])
    sources = np.searchsorted(bounds, starts, side="right") - 1
    before, after = mixture.samples(position), mixture.samples(position + count)
    assert sum(before) == position
    for index, order in enumerate(orders):
        given_out = starts[sources == index] - bounds[index]
        assert len(given_out) == after[index] - before[index]
        np.testing.assert_array_equal(given_out, order.starts(before[index], len(given_out)))


def test_shares_are_exact_over_blocks_and_near_within() -> None:
    order = MixtureOrder((SampleOrder(999, S, 0, True), SampleOrder(5000, S, 0, True)), quotas([0.3, 0.7]), seed=3)
    assert order.samples(7 * BLOCK) == (7 * order.quotas[0], 7 * order.quotas[1])
    for position in (200, 1000, 5000):
        expected = position * order.quotas[0] / BLOCK
        assert abs(order.samples(position)[0] - expected) < 5 * (position * 0.21) ** 0.5
    firsts = [np.searchsorted([999], order.starts(block * BLOCK, 64), side="right").tolist() for block in range(2)]
    assert firsts[0] != firsts[1], "blocks are dealt alike"
    assert firsts[0] != np.searchsorted([999], MixtureOrder(order.orders, order.quotas, 4).starts(0, 64)).tolist()


def test_a_sample_lies_in_one_source(mixed: PreparedData) -> None:
    """Decoded text has the letters of one source; they come in the numbers that the order says."""
    tokenizer = load_tokenizer(mixed)
    batches = loader(mixed)
    counts = dict.fromkeys(ALPHABETS, 0)
    for batch, _ in zip(batches.batches(), range(60), strict=False):
        for tokens in torch.cat([micro.tokens for micro in batch.micro_batches]).tolist():
            text = tokenizer.decode([token for token in tokens if token != mixed.eos_id])
            (source,) = [name for name, letters in ALPHABETS.items() if set(text) <= {*letters, " "}]
            counts[source] += 1
    assert isinstance(batches.order, MixtureOrder)
    assert tuple(counts.values()) == batches.order.samples(480)
    assert [part.share for part in mixed.parts] == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("document_mask", [False, True])
def test_any_number_of_ranks_and_any_start_see_the_same_batches(mixed: PreparedData, document_mask: bool) -> None:
    whole = loader(mixed, document_mask=document_mask).batches()
    for step in range(5):
        alone = torch.cat([micro.tokens for micro in next(whole).micro_batches])
        for world_size in (2, 4):
            parts = []
            for rank in range(world_size):
                batch = next(loader(mixed, world_size, rank, document_mask=document_mask).batches(8 * step))
                parts += [micro.tokens for micro in batch.micro_batches]
                assert batch.next_sample == 8 * (step + 1)
            assert torch.equal(torch.cat(parts), alone)


def test_documents_and_targets_stay_in_their_source(mixed: PreparedData) -> None:
    """`cu_seqlens` marks every separator, and targets are the tokens after."""
    for batch, _ in zip(loader(mixed, document_mask=True).batches(), range(30), strict=False):
        for micro in batch.micro_batches:
            assert micro.cu_seqlens is not None
            assert torch.equal(micro.tokens[:, 1:], micro.targets[:, :-1])
            separators = (micro.tokens.flatten() == mixed.eos_id).nonzero().flatten()
            assert set(separators.tolist()) <= set(micro.cu_seqlens.tolist())


def test_epochs_by_source(mixed: PreparedData) -> None:
    """Each source's samples so far over those it has."""
    batches = loader(mixed)
    epochs = batches.source_epochs(BLOCK)
    for part in mixed.parts:
        samples = BLOCK * part.share
        assert epochs[part.name] == samples / ((part.train.num_tokens - 1) // S)
    assert batches.source_epochs(0) == {"big": 0.0, "small": 0.0, "digits": 0.0}


def test_parts(mixed: PreparedData, config: DataConfig) -> None:
    """Every source is there whole, validated apart; the corpus is all of them, and its checksums are looked at."""
    assert [part.name for part in mixed.parts] == ["big", "small", "digits"]
    assert mixed.train.num_tokens == sum(part.train.num_tokens for part in mixed.parts)
    assert mixed.validation.num_bytes == sum(part.validation.num_bytes for part in mixed.parts)
    assert mixed.validation.num_documents == sum(part.validation.num_documents for part in mixed.parts)
    assert all(part.validation.num_tokens for part in mixed.parts)
    assert len(mixed.train.document_lengths()) == mixed.train.num_documents
    mixed.train.verify()
    assert len({part.folder for part in mixed.parts}) == 3
    definitions = {(part.folder / "tokenizer.json").read_bytes() for part in mixed.parts}
    assert definitions == {mixed.tokenizer_path.read_bytes()}
    assert mixed.vocab_size == 320


def test_a_new_weight_prepares_nothing(
    mixed: PreparedData, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.preparation._build", lambda *_: pytest.fail("prepared again"))
    weights = [entry.weight for entry in config.mixture]
    try:
        config.mixture[0].weight = 7.0
        again = prepare(config)
    finally:
        for entry, weight in zip(config.mixture, weights, strict=True):
            entry.weight = weight
    assert again.content_hash == mixed.content_hash
    assert again.parts[0].share > mixed.parts[0].share


def test_the_tokenizer_knows_all_sources(mixed: PreparedData, config: DataConfig) -> None:
    """Trained on every source: upper case, lower case and digits have tokens of several letters."""
    assert prepare_tokenizer(config).is_file()
    vocabulary = [token.lstrip("Ġ") for token in load_tokenizer(mixed).get_vocab()]
    for kind in (str.islower, str.isupper, str.isdecimal):
        assert any(len(token) > 1 and token.isascii() and kind(token) for token in vocabulary), kind


def test_progress_goes_one_way(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bar over all sources that never goes back."""
    monkeypatch.setattr("data.preparation.REPORT_INTERVAL_S", 0.0)
    seen: list[Progress] = []
    cache, config.cache_dir = config.cache_dir, str(tmp_path)
    try:
        prepared = prepare(config, seen.append)
    finally:
        config.cache_dir = cache
    for stage in ("tokenizer", "tokenize"):
        of_stage = [progress for progress in seen if progress.stage == stage]
        fractions = [progress.fraction for progress in of_stage if progress.fraction is not None]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
        sizes = [progress.num_bytes for progress in of_stage]
        assert sizes == sorted(sizes)
    assert seen[-1].tokens == prepared.train.num_tokens + prepared.validation.num_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, r"data\.mixture\[1\]\.name is ''"),
        ({"name": "Big/1"}, r"data\.mixture\[1\]\.name is 'Big/1'"),
        ({"name": "big"}, r"data\.mixture\[1\]\.name=big is there twice"),
        ({"weight": 0.0}, r"data\.mixture\[1\]\.weight=0\.0 must be above 0"),
        ({"weight": float("nan")}, r"data\.mixture\[1\]\.weight=nan"),
        ({"weight": 1e-6}, r"the weight 1e-06 of small is less than 1/4096"),
        ({"source": Source.stdlib}, r"data\.mixture\[1\]\.path=.* is not read"),
        ({"source": Source.mixture}, r"data\.mixture\[1\]\.source=mixture: a source can't be"),
        ({"validation_split": "test"}, r"data\.mixture\[1\]\.validation_split is for source hub"),
        ({"path": None}, r"data\.path is not set"),
        ({"text_key": "no"}, r"data\.text_key=no is not in"),
    ],
)
def test_what_can_not_be_mixed(config: DataConfig, change: dict[str, object], message: str) -> None:
    entry = config.mixture[1]
    before = {name: getattr(entry, name) for name in change}
    try:
        for name, value in change.items():
            setattr(entry, name, value)
        with pytest.raises(DataError, match=message):
            prepare(config)
    finally:
        for name, value in before.items():
            setattr(entry, name, value)


def test_a_mixture_of_nothing(tmp_path: Path) -> None:
    """Isn't the default source; an empty list without `data=mixture` is."""
    config = compose(["data=mixture", "data.mixture=[]", f"data.cache_dir={tmp_path / 'cache'}"]).data
    with pytest.raises(DataError, match=r"data\.mixture is empty.*list what to mix"):
        prepare(config)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("key", ["path", "subset", "revision", "split", "validation_split", "text_key"])
def test_a_key_of_one_source_beside_a_mixture(config: DataConfig, key: str) -> None:
    said = (
        rf"data\.{key}=x is not read beside data\.mixture: give it to each of its sources \(\{{name: \.\.\., {key}: x"
    )
    with pytest.raises(DataError, match=said):
        prepare(replace(config, **{key: "x"}))  # type: ignore[arg-type]


def test_a_source_shorter_than_a_sample(mixed: PreparedData) -> None:
    with pytest.raises(DataError, match=r"Source (big|small|digits) of data\.mixture has \d+ training tokens"):
        loader(mixed, sequence_length=mixed.parts[1].train.num_tokens)


def test_on_the_command_line() -> None:
    """The shipped option, and a list of one's own; a wrong key of an entry is named."""
    shipped = compose(["data=mixture"]).data.mixture
    assert [(entry.name, type(entry)) for entry in shipped] == [("code", MixtureSource), ("docs", MixtureSource)]
    given_list = "data.mixture=[{name: a, weight: 2, source: jsonl, path: x.jsonl}]"
    (entry,) = compose(["data=mixture", given_list]).data.mixture
    assert (entry.name, entry.weight, entry.source, entry.path) == ("a", 2.0, Source.jsonl, "x.jsonl")
    with pytest.raises(UserError, match="Unknown key 'wieght'"):
        compose(["data.mixture=[{name: a, wieght: 2}]"])
