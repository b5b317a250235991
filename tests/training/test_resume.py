"""Where a run goes on whose samples or corpus are not what they were: position, and what the user is told."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from configs.errors import UserError
from configs.schema import MixtureSource, Packing, RunConfig, Source
from data import PreparedData, TokenLoader, prepare, prepare_tokenizer
from tests.data.conftest import jsonl_config, make_texts, write_jsonl
from tests.training.conftest import Build, run_config
from training import checkpoint
from training.engine import Engine
from training.resume import finds_checkpoint, resume
from training.run import RunFolder
from training.state import TrainState

SEEN = 20
"""Samples of the checkpoint."""


class Said:
    """A terminal that remembers."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.remarks: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def say(self, text: str) -> None:
        self.remarks.append(text)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of up to 120 words."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", make_texts(120))


@pytest.fixture
def saved(build: Build, corpus: Path, tmp_path: Path) -> Engine:
    """Whose checkpoint lies in `tmp_path`: 20 samples of 32 tokens, in the order of the corpus."""
    config = run_config()
    config.data = jsonl_config(corpus, tmp_path / "cache", shuffle=False)
    config.data.tokenizer = str(prepare_tokenizer(config.data))  # the same for any part of the corpus
    config.model.sequence_length = 32
    one = build(config)
    prepared = prepare(config.data)
    state = TrainState(2, SEEN, SEEN * 32, corpus_hash=prepared.content_hash, wandb_id="abcd1234", last_loss=1.5)
    checkpoint.save(one, state, RunFolder(tmp_path).checkpoints, tokenizer_hash=prepared.tokenizer_hash)
    return one


def loader_of(config: RunConfig, prepared: PreparedData) -> TokenLoader:
    return TokenLoader(
        prepared.train,
        sequence_length=config.model.sequence_length,
        global_batch_size=1,
        micro_batch_size=1,
        seed=config.seed,
        shuffle=config.data.shuffle,
        packing=config.data.packing,
        prefetch=0,
    )


def go_on(saved: Engine, folder: Path, said: Said, **changes: Any) -> tuple[TrainState, TokenLoader, PreparedData]:
    """Resume with other values of `data`'s keys, or of `sequence_length`."""
    config = copy.deepcopy(saved.config)
    config.model.sequence_length = changes.pop("sequence_length", 32)
    for key, value in changes.items():
        setattr(config.data, key, value)
    prepared = prepare(config.data)
    loader = loader_of(config, prepared)
    terminal: Any = said
    return resume(saved, config, RunFolder(folder), prepared, loader, terminal).state, loader, prepared


def test_unchanged_keys_leave_all_as_it_was(saved: Engine, tmp_path: Path) -> None:
    said = Said()
    state, _, _ = go_on(saved, tmp_path, said)
    assert state == checkpoint.read_manifest(checkpoint.find_checkpoint(tmp_path)).state
    assert state.consumed_samples == SEEN
    assert said.warnings == []


@pytest.mark.parametrize("resume_key", ["auto", "never", "{}"])
def test_initial_weights_are_needed_where_there_is_no_checkpoint(
    saved: Engine, tmp_path: Path, resume_key: str
) -> None:
    config, own = copy.deepcopy(saved.config), saved.processes
    config.resume = resume_key.format(tmp_path)
    assert finds_checkpoint(config, RunFolder(tmp_path), own) == (resume_key != "never")
    shutil.rmtree(tmp_path / "checkpoints")
    assert not finds_checkpoint(config, RunFolder(tmp_path), own)


def test_checkpoints_that_go_while_the_run_begins_leave_nothing_to_begin_with(saved: Engine, tmp_path: Path) -> None:
    config = copy.deepcopy(saved.config)
    prepared, said = prepare(config.data), cast(Any, Said())
    (tmp_path / "empty").mkdir()
    given = (saved, config, RunFolder(tmp_path / "empty"), prepared, loader_of(config, prepared), said)
    assert resume(*given).origin is None
    with pytest.raises(UserError, match="went while the run began"):
        resume(*given, drawn=False)


@pytest.mark.parametrize("length", [8, 16, 48, 64, 128])
def test_another_sequence_length_goes_on_after_the_same_token(saved: Engine, tmp_path: Path, length: int) -> None:
    said = Said()
    state, loader, prepared = go_on(saved, tmp_path, said, sequence_length=length)
    begin = SEEN * 32 // length * length  # the rest of a sample is read again
    assert state.consumed_samples == begin // length
    assert state.tokens_seen == SEEN * 32
    batch = next(loader.batches(state.consumed_samples))
    stream = np.concatenate(list(prepared.train.documents()))
    assert batch.micro_batches[0].tokens.tolist() == [stream[begin : begin + length].tolist()]
    assert said.warnings == [
        f"model.sequence_length was 32, is {length}: the run goes on differently from how it would have",
        f"the 640 tokens seen were 20 samples, and count as {begin // length} of the samples now",
    ]


def test_a_shuffled_corpus_is_at_the_same_share_of_its_epoch(saved: Engine, tmp_path: Path) -> None:
    said = Said()
    state, _, _ = go_on(saved, tmp_path, said, sequence_length=16, shuffle=True)
    assert state.consumed_samples == 40
    assert said.warnings[-1].endswith(
        "data.shuffle orders them anew: some text of this epoch comes again, some not at all"
    )


@pytest.mark.parametrize("mixed", [False, True])
def test_packing_goes_on_after_about_as_many_tokens(saved: Engine, corpus: Path, tmp_path: Path, mixed: bool) -> None:
    """Of a mixture, whose sources fill their rows differently, after as many of all."""
    said = Said()
    changes: dict[str, Any] = {"packing": Packing.best_fit, "sequence_length": 128, "shuffle": True}
    if mixed:
        words = write_jsonl(tmp_path / "words.jsonl", [" ".join(["word"] * (14 + index % 3)) for index in range(60)])
        sources = [("texts", corpus, 1.0), ("words", words, 3.0)]
        changes["mixture"] = [MixtureSource(name, w, source=Source.jsonl, path=str(p)) for name, p, w in sources]
        changes["path"] = None
    state, loader, _ = go_on(saved, tmp_path, said, **changes)
    assert loader.packing is not None
    fill = loader.packing.row_tokens
    for tokens in (SEEN * 32, 5_000, 50_000):
        position = loader.position_after(tokens)
        assert abs(int(fill[loader.order.starts(0, position)].sum()) - tokens) < 2 * 128 + 0.02 * tokens
    assert state.consumed_samples == loader.position_after(SEEN * 32)
    if not mixed:
        assert loader.position_after(3 * int(fill.sum())) == 3 * loader.samples_per_epoch


def test_other_shards_are_the_same_text(saved: Engine, tmp_path: Path) -> None:
    said = Said()
    state, _, prepared = go_on(saved, tmp_path, said, shard_tokens=1000)
    assert len(prepared.train.info.shards) > len(prepare(saved.config.data).train.info.shards)
    assert (state.consumed_samples, state.corpus_hash) == (SEEN, prepared.content_hash)
    assert said.warnings == []
    assert "  data.shard_tokens was 2000, is 1000: changes rounding, speed or output at most" in said.remarks
    assert any("its hash can't be compared" in remark for remark in said.remarks)


@pytest.mark.parametrize(("changes", "key"), [({}, "data.shard_tokens"), ({"max_documents": 60}, "data.max_documents")])
def test_shards_that_cut_documents_are_other_text(
    saved: Engine, tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    """As are those of other documents."""
    said = Said()
    go_on(saved, tmp_path, said, shard_tokens=1000 if changes else 100, **changes)
    assert len(said.warnings) == 2
    assert said.warnings[0].startswith(f"{key} was ")
    assert "goes on differently" in said.warnings[0]
    assert "the corpus differs from the one of the checkpoint" in said.warnings[1]
