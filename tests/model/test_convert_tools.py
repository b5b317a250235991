"""`scripts/import_hf.py` and `scripts/export_hf.py`: a published model becomes a checkpoint, and a folder again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs import compose
from configs.errors import UserError
from data.tokenizer import train_tokenizer
from model import build_model
from model.convert import export_hf
from scripts import export_hf as export_tool
from scripts import import_hf as import_tool
from scripts import sample as sample_tool
from tests.model.small import LLAMA, small
from training.checkpoint import find_checkpoint, load_weights


@pytest.fixture
def published(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A `transformers` folder of a small model with a trained tokenizer."""
    tokenizer = train_tokenizer(["def main(): return 0\n" * 9], 270)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = small(vocab_size=tokenizer.get_vocab_size(), **request.param)
    folder = tmp_path / "published"
    export_hf(config, build_model(config).state_dict(), folder, tokenizer=tmp_path / "tokenizer.json", eos_id=0)
    return folder


MODELS: list[dict[str, Any]] = [
    {"num_heads": 8, "num_layers": 3},
    LLAMA | {"num_kv_heads": 2, "tied_embeddings": False},
]


@pytest.mark.parametrize("published", MODELS, indirect=True, ids=["gpt2", "llama"])
def test_there_and_back(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_tool.main(import_tool.parse([str(published), str(tmp_path / "imported")]))
    line = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("Next: "))
    keys = [word for word in line.split() if word.startswith("model.")]

    # The keys it prints make the model that its checkpoint fits.
    model = build_model(compose(keys).model)
    load_weights(model, find_checkpoint(tmp_path / "imported"))

    arguments = [str(tmp_path / "imported"), str(tmp_path / "exported"), "--tokenizer", str(published)]
    export_tool.main(export_tool.parse(arguments))
    first, second = (load_file(folder / "model.safetensors") for folder in (published, tmp_path / "exported"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (published / "config.json").read_text() == (tmp_path / "exported" / "config.json").read_text()

    export_tool.main(export_tool.parse([*arguments, "--dtype", "bf16"]))
    assert {t.dtype for t in load_file(tmp_path / "exported" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("published", MODELS[:1], indirect=True)
def test_what_cannot_be_is_said(published: Path, tmp_path: Path) -> None:
    import_tool.main(import_tool.parse([str(published), str(tmp_path / "imported")]))
    other = tmp_path / "other.json"
    train_tokenizer(["x = y\n" * 9], 262).save(str(other))
    arguments = [str(tmp_path / "imported"), str(tmp_path / "exported"), "--tokenizer", str(other)]
    with pytest.raises(UserError, match="not the tokenizer this run was trained with"):
        export_tool.main(export_tool.parse(arguments))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file can't be written: File exists"):
        export_tool.main(export_tool.parse([str(tmp_path / "imported"), str(tmp_path / "file")]))
    with pytest.raises(UserError, match="no checkpoint"):
        export_tool.main(export_tool.parse([str(tmp_path / "nowhere"), str(tmp_path / "exported")]))
    (published / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        import_tool.main(import_tool.parse([str(published), str(tmp_path / "again")]))


@pytest.mark.parametrize("published", MODELS[1:], indirect=True)
def test_sampling_from_a_checkpoint(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_tool.main(import_tool.parse([str(published), str(tmp_path / "imported")]))
    capsys.readouterr()
    arguments = [str(tmp_path / "imported"), "--prompt", "def", "--tokens", "12", "--number", "2", "--device", "cpu"]
    texts = []
    for seed in ("0", "0", "1"):
        sample_tool.main(sample_tool.parse([*arguments, "--seed", seed]))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].count("def") >= 2
    assert "2 of 2" in texts[0]
