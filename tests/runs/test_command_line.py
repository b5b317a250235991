"""train.py as a user meets it: what it prints, leaves behind, and says about mistakes."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing

from data.tokenizer import train_tokenizer
from scripts import sample
from tests.data.conftest import make_texts, write_jsonl
from tests.runs.conftest import ENVIRONMENT, ROOT, Runs, rows
from training.saved_run import open_saved


@pytest.fixture(scope="module")
def finished(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("finished")
    result = runs.run(f"run_dir={folder}", "logging.plot=true", "train.sample_tokens=8", "logging.wandb=auto")
    return folder, result.stdout + result.stderr


def test_run_folder_has_what_scripts_rely_on(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 8
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step_00000008"
    assert list((folder / "wandb").glob("offline-run-*"))
    assert "DeepSpeed" in (folder / "run.log").read_text()


def test_metrics_have_the_documented_keys(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    lines = rows(folder)
    assert [row["step"] for row in lines] == list(range(1, 9))
    for key in ("train/loss", "train/perplexity", "optim/lr", "optim/grad_norm", "data/tokens_seen"):
        assert all(key in row for row in lines), key
    for key in ("perf/tokens_per_s", "perf/step_time_s", "perf/data_wait_s", "perf/model_tflops", "perf/mfu_causal"):
        assert all(key in row for row in lines[2:]), key  # the first two steps are warm-up
    assert all({"val/loss", "val/bits_per_byte"} <= set(lines[i]) for i in (3, 7))
    assert lines[-1]["data/tokens_seen"] == 8 * 4 * 32


def test_terminal_is_ours(finished: tuple[Path, str]) -> None:
    _, output = finished
    assert "step 8/8" in output
    assert "bits per byte" in output
    assert "sample" in output
    assert "train longer" in output
    for noise in ("INFO", "DeepSpeed", "FutureWarning", "Traceback", "wandb:"):
        assert noise not in output, output


def test_finished_run_says_so(runs: Runs, finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_text()
    result = runs.forked(f"run_dir={folder}")
    assert "Nothing to do" in result.stdout
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.stepz=3"], ["Did you mean 'train.steps'"]),
        (["+train.stepz=3"], ["error: Unknown key 'train.stepz'"]),
        (["experiment=gpt5"], ["There is no experiment 'gpt5'"]),
        (["train.steps=three"], ["'train.steps'", "three"]),
        (["data=text", "data.path=nowhere/*.txt"], ["data.path", "nowhere"]),
        (["train.micro_batch_size=3"], ["train.global_batch_size", "train.micro_batch_size"]),
        (["resume=nowhere"], ["resume=nowhere does not exist"]),
        (["model.attention=flash", "model.head_dim=300"], ["model.head_dim", "256"]),
        (["engine=zero3", "engine.fuse_weight_gradients=on"], ["engine.fuse_weight_gradients=on"]),
        (["model.vocab_size=100"], ["model.vocab_size=100"]),
        (["logging.wandb=online"], ["logging.wandb=online", "logging.wandb=auto"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_get_a_short_message(runs: Runs, tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    result = runs.forked(f"run_dir={tmp_path / 'run'}", *overrides, code=None)
    output = result.stdout + result.stderr
    assert result.returncode not in (0, 3), output
    for word in words:
        assert word in output, output
    assert "Traceback" not in output
    assert len(output.splitlines()) <= 25, output


def test_empty_corpus_is_named(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    result = runs.forked(f"run_dir={tmp_path / 'run'}", "data=text", f"data.path={tmp_path}/empty.txt", code=None)
    assert result.returncode != 0
    assert "Traceback" not in result.stdout + result.stderr
    assert "empty.txt" in result.stdout + result.stderr


def test_own_tokenizer_trains_and_samples(runs: Runs, tmp_path: Path) -> None:
    """One that names its separator, and puts tokens around a text that documents don't have."""
    tokenizer = train_tokenizer(make_texts(40), 300)
    tokenizer.add_special_tokens(["<begin>", "<end>"])
    tokenizer.post_processor = TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 300)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    corpus, folder = write_jsonl(tmp_path / "corpus.jsonl", make_texts(40)), tmp_path / "run"
    settings = ["data=jsonl", f"data.path={corpus}", f"data.tokenizer={tmp_path}", f"run_dir={folder}", "train.steps=1"]
    runs.forked(*settings, "train.sample_tokens=4", "train.sample_prompt=''")
    saved = open_saved(folder)
    assert (saved.info.eos_token, saved.info.eos_id) == ("<end>", 301)
    prompts = []

    def generate(model: object, start: torch.Tensor, *_: object) -> torch.Tensor:
        prompts.append(start.tolist())
        return start

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "generate", generate)
        for prompt in ("", "ab"):
            sample.main(sample.parse([str(folder), "--prompt", prompt, "--device", "cpu"]))
    assert prompts == [[[301]], [saved.tokenizer.encode("ab").ids[1:]]]


def test_own_text_trains(runs: Runs, tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"document {number}: " + "to be or not to be, " * 60)
    folder = tmp_path / "run"
    runs.forked("data=text", f"data.path={tmp_path}/*.txt", f"run_dir={folder}", "train.steps=2")
    assert len(rows(folder)) == 2


def test_cfg_job_prints_the_config_and_trains_nothing(runs: Runs, tmp_path: Path) -> None:
    result = runs.forked("--cfg", "job", f"run_dir={tmp_path / 'run'}")
    assert yaml.safe_load(result.stdout)["model"]["width"] == 32
    assert not (tmp_path / "run").exists()


def test_sweep_trains_each_job_in_its_own_folder_and_stays_where_the_user_is(runs: Runs, tmp_path: Path) -> None:
    overrides = ["seed=1,2", "train.steps=2", "run_dir=sweep", "train.eval_every=0", "train.save_every=0"]
    runs.forked("--multirun", *overrides, cwd=tmp_path)
    folders = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert [folder.name[:1] for folder in folders] == ["0", "1"]
    first, second = ([json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in folders)
    assert len(first) == len(second) == 2
    assert first[-1]["train/loss"] != second[-1]["train/loss"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"]


@pytest.mark.parametrize("shell", ["{} | head -1", "{} >&-", "{} >&- 2>&-", "{} >/dev/full"])
def test_a_run_goes_on_whoever_reads(runs: Runs, tmp_path: Path, shell: str) -> None:
    """Its reader is gone, or there never was one."""
    command = shell.format(shlex.join(runs.command(f"run_dir={tmp_path / 'run'}")))
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=240, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(rows(tmp_path / "run")) == 8
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step_00000008"


def test_a_tool_whose_reader_has_gone_ends_quietly(finished: tuple[Path, str]) -> None:
    """With the exit code of one that SIGPIPE ends, whatever it prints by, and nothing else is taken for it."""
    buffered = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONUNBUFFERED"}
    tool = "import sys; from configs import run_tool\n"
    lines = "def main():\n    for line in range({}): print(line)\nrun_tool(main)"
    other = "def main():\n    raise BrokenPipeError(32, 'of a worker')\nrun_tool(main)"
    sample = [str(ROOT / "scripts" / "sample.py"), str(finished[0]), "--tokens=2", "--number=2", "--device=cpu"]
    for arguments, reader, code, said in (
        (sample, "true", 141, ""),
        (["-c", tool + lines.format(10)], "true", 141, ""),  # in the buffer until the end
        (["-c", tool + lines.format(100_000)], "head -1", 141, ""),
        (["-c", tool + lines.format(10)], "cat", 0, ""),
        (["-c", tool + other], "cat", 1, "of a worker"),
    ):
        command = f"{shlex.join([sys.executable, *arguments])} | {reader}"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, env=buffered,
                              capture_output=True, text=True, timeout=240, check=False)  # fmt: skip
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        assert said in done.stderr if said else done.stderr == "", (arguments, done.stderr)


@pytest.mark.parametrize("flags", ["--cfg job", "--cfg=job", "--help", "--hydra-help", "--info all"])
def test_what_hydra_prints_ends_quietly_without_a_reader(flags: str) -> None:
    """Some of it is more than a buffer holds; without one each line meets the closed pipe."""
    command = f"{sys.executable} -u {ROOT / 'train.py'} {flags} | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=240, check=False)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


def test_launchers_agree(runs: Runs, tmp_path: Path) -> None:
    """Two ranks under torchrun see the global batches of one, the losses are equal to rounding; one of them speaks."""
    one, two = tmp_path / "one", tmp_path / "two"
    runs.forked(f"run_dir={one}", "--local_rank=0")  # as the deepspeed launcher appends it
    result = runs.run(f"run_dir={two}", processes=2)
    assert "2 ranks" in result.stdout
    assert result.stdout.count("step 8/8") == 1
    for a, b in zip(rows(one), rows(two), strict=True):
        assert abs(a["train/loss"] - b["train/loss"]) < 2e-5 * a["train/loss"]


def test_no_absolute_path_or_secret_in_the_config(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    text = (folder / "config.yaml").read_text()
    assert str(ROOT) not in text
    assert "api_key" not in text.lower()
