"""The record of a run: metrics.jsonl across resumes, and wandb read back from its own files."""

from __future__ import annotations

import errno
import http.server
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.schema import LoggingConfig, RunConfig, WandbMode
from training import logging as run_logging
from training.logging import MetricsFile, RunLogger, read_metrics, system_info
from training.run import RunFolder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """An empty run folder; no key, no netrc, no wandb settings of the user."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb_cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb_data"))
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    return folder


def config(mode: WandbMode = WandbMode.offline, **changes: Any) -> RunConfig:
    return RunConfig(name="test", logging=LoggingConfig(wandb=mode, **changes))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# metrics.jsonl


def test_one_object_a_step(folder: RunFolder) -> None:
    file = MetricsFile(folder.metrics)
    file.write(10, {"train/loss": 3.0})
    assert rows(folder.metrics) == [{"step": 10, "train/loss": 3.0}]  # there at once, before close
    file.write(20, {"train/loss": 2.512345678})
    file.write(20, {"val/loss": 2.75})
    assert rows(folder.metrics)[1] == {"step": 20, "train/loss": 2.512345678, "val/loss": 2.75}
    file.write(20, {"train/loss": 2.0})  # a shorter line than the one it replaces
    file.write(30, {"train/loss": 1.0})
    file.close()
    assert rows(folder.metrics) == [
        {"step": 10, "train/loss": 3.0},
        {"step": 20, "train/loss": 2.0, "val/loss": 2.75},
        {"step": 30, "train/loss": 1.0},
    ]


def test_resume_drops_what_lies_ahead_and_adds_to_the_resumed_step(folder: RunFolder) -> None:
    file = MetricsFile(folder.metrics)
    for step in (10, 20, 30, 40):
        file.write(step, {"train/loss": 1.0})
    file.close()
    file = MetricsFile(folder.metrics, resume_step=20)
    assert [row["step"] for row in rows(folder.metrics)] == [10, 20]  # at once: a crash now leaves a consistent file
    file.write(20, {"val/loss": 2.0})
    file.write(30, {"train/loss": 0.5})
    file.close()
    assert rows(folder.metrics) == [
        {"step": 10, "train/loss": 1.0},
        {"step": 20, "train/loss": 1.0, "val/loss": 2.0},
        {"step": 30, "train/loss": 0.5},
    ]


def test_new_run_begins_empty(folder: RunFolder) -> None:
    folder.metrics.write_text('{"step": 5, "train/loss": 1.0}\n')
    MetricsFile(folder.metrics).close()
    assert folder.metrics.read_text() == ""


def test_line_cut_short_by_a_crash_is_dropped(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    folder.metrics.write_text('{"step": 1, "train/loss": 1.0}\n{"step": 2, "train/lo')
    MetricsFile(folder.metrics, resume_step=2).close()
    assert rows(folder.metrics) == [{"step": 1, "train/loss": 1.0}]
    assert caplog.text == ""
    folder.metrics.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    assert [row["step"] for row in read_metrics(folder.metrics)] == [1, 2]
    assert "metrics.jsonl:2" in caplog.text


class FullDisk:
    """A file on a disk that has room for so many more bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room and data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.room])
        self.room -= written
        return int(written)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_full_disk_costs_no_row(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    """Half a line fits, then none; what had no room is written when there is some. It is said once."""
    file = MetricsFile(folder.metrics)
    file.write(10, {"train/loss": 3.0})
    file._file = disk = FullDisk(file._file, room=5)
    file.write(10, {"val/loss": 2.0})
    assert rows(folder.metrics) == []  # of the line that was to be longer there is no half
    file.write(20, {"train/loss": 2.5})
    file.write(20, {"val/loss": 2.4})
    disk.room = 1000
    file.write(30, {"train/loss": 2.0})
    whole = [
        {"step": 10, "train/loss": 3.0, "val/loss": 2.0},
        {"step": 20, "train/loss": 2.5, "val/loss": 2.4},
        {"step": 30, "train/loss": 2.0},
    ]
    assert rows(folder.metrics) == whole
    file.write(30, {"val/loss": 1.0})
    assert rows(folder.metrics) == [*whole[:2], whole[2] | {"val/loss": 1.0}]
    disk.room = 0
    file.write(40, {"train/loss": 1.0})
    file.close()
    said = [record.getMessage() for record in caplog.records]
    assert ["No space left" in line for line in said] == [True, False]
    assert "lacks its last 1 rows" in said[1]


def test_numbers_that_json_lacks_are_null(folder: RunFolder) -> None:
    file = MetricsFile(folder.metrics)
    file.write(1, {"train/loss": float("nan"), "train/perplexity": float("inf"), "optim/lr": 1e-4})
    file.close()
    assert (
        folder.metrics.read_text() == '{"step": 1, "train/loss": null, "train/perplexity": null, "optim/lr": 0.0001}\n'
    )


def test_steps_do_not_go_back(folder: RunFolder) -> None:
    file = MetricsFile(folder.metrics)
    file.write(2, {})
    with pytest.raises(ValueError, match="step 1 comes after step 2"):
        file.write(1, {})
    file.close()


def test_kill_leaves_a_readable_file(folder: RunFolder) -> None:
    code = (
        "import itertools; from pathlib import Path; from training.logging import MetricsFile\n"
        f"file = MetricsFile(Path({str(folder.metrics)!r}))\n"
        "print('ready', flush=True)\n"
        "for step in itertools.count(1):\n"
        "    file.write(step, {'train/loss': 1.0}); file.write(step, {'val/loss': 2.0})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    process.kill()
    process.wait()
    found = read_metrics(folder.metrics)
    assert len(found) > 10
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))


# wandb, offline: the files are read back


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB) around protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, block, partial = 7, 32768, b""
    while position + 7 <= len(data):
        if block - position % block < 7:  # a header never straddles blocks
            position += block - position % block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        partial += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(partial)
            partial = b""
            yield record


def offline_files(folder: RunFolder) -> list[Path]:
    """The .wandb files, oldest first, once wandb's service has written everything: `finish` doesn't wait for it."""
    import wandb

    wandb.teardown()
    return sorted(folder.wandb.glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def history(path: Path) -> list[dict[str, Any]]:
    found = []
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            items.setdefault("_step", record.history.step.num)
            found.append(items)
    return found


def test_offline_run_is_read_back_and_goes_on_after_a_resume(
    folder: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    first = RunLogger(folder, config(project="proj", group="grp", tags=["a", "b"]), info={"peak": 1.5})
    assert first.wandb_id
    assert first.wandb_note.startswith("offline; to upload: wandb sync ")
    for step in (10, 20, 30, 40):
        first.log(step, {"train/loss": 50.0 - step, "perf/mfu": None})
    first.log(40, {"val/loss": 11.0})
    first.log_sample(40, "def <b>", " f(): pass")
    first.finish()

    second = RunLogger(folder, config(), resume_step=20, wandb_id=first.wandb_id)
    assert second.wandb_id == first.wandb_id
    for step in (30, 40, 50):
        second.log(step, {"train/loss": 50.0 - step})
    second.finish()
    second.finish()  # twice does no harm

    assert capfd.readouterr() == ("", "")  # wandb says nothing itself
    one, two = offline_files(folder)
    for path in (one, two):
        records = list(wandb_records(path))
        run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
        assert (run.run_id, run.display_name) == (first.wandb_id, "test")
        axes = {record.metric.glob_name or record.metric.name: record.metric.step_metric for record in records
                if record.WhichOneof("record_type") == "metric"}  # fmt: skip
        assert axes["*"] == "step"
    before, after = history(one), history(two)
    assert [(row["step"], row["train/loss"]) for row in before] == [(10, 40.0), (20, 30.0), (30, 20.0), (40, 10.0)]
    assert before[-1]["val/loss"] == 11.0
    assert "perf/mfu" not in before[0]
    assert [(row["step"], row["train/loss"]) for row in after] == [(30, 20.0), (40, 10.0), (50, 0.0)]
    # wandb drops rows whose internal step doesn't grow, over both files, since they are one run.
    internal = [row["_step"] for row in before + after]
    assert internal == sorted(set(internal))
    assert internal[-1] == 50  # and comes back to our step once it is ahead
    (sample,) = folder.wandb.glob("offline-run-*/files/media/html/samples/*.html")
    assert "<b>def &lt;b&gt;</b> f(): pass" in sample.read_text()
    settings = next(record.run.config for record in wandb_records(one) if record.WhichOneof("record_type") == "run")
    sent = {item.key: json.loads(item.value_json) for item in settings.update}
    assert sent["train"]["steps"] == RunConfig().train.steps
    assert sent["system"] == {"peak": 1.5}


def test_resume_without_a_finish_does_not_drop_steps(folder: RunFolder) -> None:
    """Twice back to step 20, as after a kill: the internal step still grows over all files."""
    for begin, end in ((0, 60), (20, 30), (20, 25)):
        logger = RunLogger(folder, config(), resume_step=begin, wandb_id="abcd1234")
        for step in range(begin + 1, end + 1):
            logger.log(step, {"train/loss": 1.0})
    logger.finish()
    state = json.loads((folder.wandb / "last_step.json").read_text())
    assert state == {"id": "abcd1234", "internal_step": 60 + 10 + 5}
    assert [row["step"] for row in rows(folder.metrics)] == list(range(1, 26))
    written = [row for path in offline_files(folder) for row in history(path)]
    assert sorted(row["_step"] for row in written) == list(range(1, 76))


def test_picture(folder: RunFolder) -> None:
    from matplotlib.figure import Figure

    Figure().savefig(folder.curves)
    logger = RunLogger(folder, config())
    logger.log_image(5, "curves", folder.curves)
    logger.finish()
    (row,) = history(offline_files(folder)[0])
    assert row["step"] == 5
    assert list(folder.wandb.glob("offline-run-*/files/media/images/curves*.png"))


# wandb's mode


def test_disabled_leaves_no_trace(folder: RunFolder) -> None:
    logger = RunLogger(folder, config(WandbMode.disabled))
    logger.log(1, {"train/loss": 1.0})
    logger.log_sample(1, "a", "b")
    logger.finish()
    assert (logger.wandb_id, logger.wandb_note) == (None, "")
    assert not folder.wandb.exists()
    assert rows(folder.metrics) == [{"step": 1, "train/loss": 1.0}]


def test_other_ranks_write_nothing(folder: RunFolder) -> None:
    logger = RunLogger(folder, config(), wandb_id="abcd1234", enabled=False)
    logger.log(1, {"train/loss": 1.0})
    logger.log_sample(1, "a", "b")
    logger.log_image(1, "curves", folder.curves)
    logger.finish()
    assert logger.wandb_id == "abcd1234"
    assert list(folder.path.iterdir()) == []


def test_auto_without_a_key_is_offline_at_once(folder: RunFolder) -> None:
    start = time.monotonic()
    logger = RunLogger(folder, config(WandbMode.auto, wandb_timeout_s=30.0))
    assert time.monotonic() - start < 10
    assert logger.wandb_note.startswith("offline (no API key")
    logger.finish()


def test_environment_decides_for_auto_only(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    RunLogger(folder, config(WandbMode.auto)).finish()
    assert not folder.wandb.exists()
    RunLogger(folder, config(WandbMode.offline)).finish()
    assert offline_files(folder)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def failing_server() -> Iterator[str]:
    """A server that answers every request with an error."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def _fail(self) -> None:
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = do_HEAD = _fail  # noqa: N815 - the base class's names

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on the terminal."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _with_key(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    import wandb

    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("server", ["silent_server", "failing_server"])
def test_auto_with_a_key_and_a_bad_network_is_offline_in_time(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, server: str
) -> None:
    _with_key(monkeypatch, request.getfixturevalue(server))
    start = time.monotonic()
    logger = RunLogger(folder, config(WandbMode.auto, wandb_timeout_s=2.0))
    assert time.monotonic() - start < 25  # 2 s, 3 s of grace, and two starts of wandb's service on a busy machine
    assert logger.wandb_note.startswith("offline (")
    logger.log(1, {"train/loss": 1.0})
    logger.finish()
    assert [row["train/loss"] for row in history(offline_files(folder)[-1])] == [1.0]


def test_silent_server_is_given_up_in_time(silent_server: str) -> None:
    start = time.monotonic()
    assert run_logging._why_unreachable(silent_server, 0.5) == f"{silent_server} doesn't answer within 0.5 s"
    assert time.monotonic() - start < 5


def test_online_on_demand_fails_before_the_run(folder: RunFolder) -> None:
    with pytest.raises(UserError, match=r"logging\.wandb=online, but no API key"):
        RunLogger(folder, config(WandbMode.online))


def test_key_in_netrc_counts(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password secret\n")
    assert run_logging._has_key("https://wandb.example.org")
    assert not run_logging._has_key("https://other.example.org")


def test_failure_of_wandb_is_said_once_and_the_run_goes_on(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = RunLogger(folder, config())
    assert logger._wandb is not None
    run = logger._wandb._run

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("service is gone")

    monkeypatch.setattr(type(run), "log", broken)
    for step in (1, 2, 3):
        logger.log(step, {"train/loss": 1.0})
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in warnings] == [
        "wandb failed and is off from now on; metrics.jsonl goes on: service is gone"
    ]
    logger.finish()
    run.finish()
    assert len(rows(folder.metrics)) == 3


def test_system_info_names_versions() -> None:
    import torch

    info = system_info(world_size=2)
    assert info["torch"] == torch.__version__
    assert info["world_size"] == 2
    assert json.dumps(info)
