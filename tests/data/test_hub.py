"""A hub that does not answer: an error that says so within a bounded time, and no question where the data is there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.schema import DataConfig, Source
from data import DataError, PreparedData, prepare
from data.sources import hub, open_sources
from data.sources.hub import HubSource, Opened
from data.tokenizer import fetch_tokenizer, inspect_tokenizer
from tests.data.conftest import jsonl_config, make_texts
from tests.data.test_tools import ROOT


class SilentHub:
    """Accepts every connection; answers the first `answers` requests with 404, the others never."""

    def __init__(self, answers: int) -> None:
        self.requests: list[str] = []
        self.answers = answers
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # closed
                return
            self.open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            request = connection.recv(1 << 16).split(b"\r\n")[0].decode()
        except OSError:  # closed
            return
        if "agent-harnesses" in request:  # the client's own business
            return
        self.requests.append(request)
        if len(self.requests) <= self.answers:
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            connection.close()

    def close(self) -> None:
        for connection in (self.listener, *self.open):
            connection.close()


@pytest.fixture(params=[0, 1], ids=["silent", "silent_after_the_probe"])
def silent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SilentHub]:
    from huggingface_hub import constants

    server = SilentHub(request.param)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template[template.index("/{repo_id}") :])
    monkeypatch.setattr(hub, "PROBE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(hub, "HUB_TIMEOUT_S", 3.0)
    yield server
    server.close()


def hub_config(folder: Path) -> DataConfig:
    """A dataset of the hub, with the small settings of the other tests."""
    return jsonl_config(Path("owner/name"), folder / "cache", source=Source.hub)


MESSAGE = r"owner/name .*(can't be reached \(timed out\)|gave no answer for 3 s).* use local files"


@pytest.mark.parametrize("cursor", [None, {"commit": "a" * 40, "row": 7}], ids=["first", "resumed"])
def test_a_dataset_that_is_not_there_yet(silent: SilentHub, tmp_path: Path, cursor: dict[str, object] | None) -> None:
    source, _ = open_sources(hub_config(tmp_path))
    begin = time.monotonic()
    with pytest.raises(DataError, match=MESSAGE):
        source.read(cursor)
    assert time.monotonic() - begin < 20
    assert silent.requests, "nothing was asked"


def test_a_tokenizer_that_is_not_there_yet(silent: SilentHub, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(DataError, match=MESSAGE):
        fetch_tokenizer("owner/name", tmp_path)
    assert time.monotonic() - begin < 20


def test_a_tokenizer_that_names_no_separator(
    tiny: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its repository has a tokenizer.json and nothing else: as beside a file, a known separator is looked for."""
    from huggingface_hub.errors import EntryNotFoundError

    class MissingError(OSError, EntryNotFoundError):
        """As the client raises it, which takes a response."""

    def download(name: str, file: str, cache_dir: str) -> str:
        if file != "tokenizer.json":
            raise MissingError(f"404: {file}")
        return str(tiny.tokenizer_path)

    monkeypatch.setattr("data.tokenizer.probe_hub", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    tokenizer, separator = fetch_tokenizer("owner/name", tmp_path)
    assert separator is None
    assert inspect_tokenizer(tokenizer).hash == tiny.tokenizer_hash


def test_from_the_command_line(tmp_path: Path) -> None:
    """With the limits as they are; the thread that waits for the hub doesn't keep the process."""
    server = SilentHub(0)
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "data=hub", "data.path=owner/name"]
    begin = time.monotonic()
    result = subprocess.run(
        [*command, f"data.cache_dir={tmp_path}"],
        env={**os.environ, "HF_ENDPOINT": server.url},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    server.close()
    assert result.returncode == 2
    assert "data.path=owner/name" in result.stderr
    assert f"{server.url} can't be reached (timed out)" in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - begin < 60


def test_what_was_prepared_is_used_without_asking(
    silent: SilentHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def from_memory(self: HubSource, cursor: dict[str, object]) -> Opened:
        dataset = datasets.Dataset.from_dict({"text": make_texts(60)})
        return Opened(dataset.to_iterable_dataset(), 60, "a" * 40)

    with monkeypatch.context() as patch:
        patch.setattr(HubSource, "open", from_memory)
        before: PreparedData = prepare(hub_config(tmp_path))
    begin = time.monotonic()
    after = prepare(hub_config(tmp_path))
    assert after.content_hash == before.content_hash
    assert json.loads((after.folder / "manifest.json").read_text())["source"]["commit"] == "a" * 40
    assert time.monotonic() - begin < 5
    assert not silent.requests
