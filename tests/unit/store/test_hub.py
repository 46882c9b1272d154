"""Models named by hub id, fetched from a small server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "acme/tiny-llama"

# The hub library reads its environment when it is imported: a process for each test.
SCRIPT = """
import sys
from cqil_dist.errors import CqilError
from cqil_dist.store import store
from cqil_dist.progress import ConsoleProgress
try:
    print(getattr(store, sys.argv[1])(sys.argv[2], ConsoleProgress()))
except CqilError as error:
    print(type(error).__name__, error)
"""


@dataclass
class FakeHub:
    """A hub with one repository, which may be gone, and a record of the files that were fetched."""

    files: dict[str, bytes]
    gone: bool = False
    fetched: list[str] = field(default_factory=list)

    def answer(self, method: str, url: str) -> tuple[int, dict[str, str], bytes]:
        path = urlsplit(url).path
        if self.gone or REPO not in path:
            return 404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "Repository not found"}'
        if path.startswith(f"/api/models/{REPO}/revision/main"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            info = {"id": REPO, "sha": COMMIT, "siblings": siblings}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        if path.startswith(f"/api/models/{REPO}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                for name, data in self.files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        if name not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        if method == "GET":
            self.fetched.append(name)
        headers = {"ETag": f'"{_etag(self.files[name])}"', "X-Repo-Commit": COMMIT}
        return 200, headers, self.files[name]


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(
    converted_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FakeHub]:
    (finished,) = (converted_cache / "models").iterdir()
    files = {file.name: file.read_bytes() for file in finished.iterdir()}
    del files["manifest.json"]
    other = {"README.md": b"#", "pytorch_model.bin": b"p", "onnx/model.onnx": b"o"}
    hub = FakeHub({**files, **other, "consolidated.safetensors": b"c"})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.command, self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield hub
    server.shutdown()
    server.server_close()


def run(function: str, model: str = REPO) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, function, model],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_only_what_a_model_directory_needs_is_fetched_and_once(hub: FakeHub, cache: Path) -> None:
    path = Path(run("resolve")[0])
    wanted = set(hub.files) - {
        "README.md",
        "pytorch_model.bin",
        "onnx/model.onnx",
        "consolidated.safetensors",
    }
    assert set(hub.fetched) == wanted
    assert {file.name for file in path.iterdir()} == wanted | {"manifest.json"}
    assert all((path / name).read_bytes() == hub.files[name] for name in wanted)
    assert json.loads((path / "manifest.json").read_text())["origin"] == {"commit": COMMIT}

    hub.gone = True  # what is here needs no hub any more
    assert Path(run("resolve")[0]) == path


def test_damage_is_repaired_from_the_hub(hub: FakeHub, cache: Path) -> None:
    path = Path(run("resolve")[0])
    weights = path / "model.safetensors"
    damaged = b"x" * len(hub.files["model.safetensors"])
    weights.resolve().write_bytes(damaged)

    hub.gone = True  # and not from the hub library's cache, where the damage is
    assert run("fetch")[0].startswith("ModelNotFound")
    assert weights.read_bytes() == damaged

    hub.gone = False
    assert "Making acme/tiny-llama again: model.safetensors has changed" in run("fetch")[1]
    assert weights.read_bytes() == hub.files["model.safetensors"]


def test_copy_in_the_hub_librarys_cache_serves_without_a_network(hub: FakeHub, cache: Path) -> None:
    run("resolve")
    entry = next((cache / "models").iterdir())
    for file in entry.iterdir():
        file.unlink()
    entry.rmdir()
    hub.gone = True
    path = Path(run("resolve")[0])
    assert (path / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_repository_without_safetensors(hub: FakeHub, cache: Path) -> None:
    del hub.files["model.safetensors"], hub.files["consolidated.safetensors"]
    out, _ = run("resolve")
    assert out.startswith("CheckpointError acme/tiny-llama@main holds no *.safetensors weights")
    assert hub.fetched == []


def test_unknown_repository(hub: FakeHub, cache: Path) -> None:
    out, _ = run("resolve", "acme/other@v1")
    assert out.startswith("ModelNotFound 'acme/other' is not a directory or file here")
    assert "'v1'" in out
    assert "hf auth login" in out


def test_offline_is_told_at_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    start = time.monotonic()
    out, _ = run("resolve")
    assert time.monotonic() - start < 10
    assert out.startswith("ModelNotFound")
    assert "offline mode" in out
    assert "name a local model directory" in out


def test_hub_that_never_answers_is_given_up(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        start = time.monotonic()
        out, _ = run("resolve")
    assert time.monotonic() - start < 25
    assert out.startswith("ModelNotFound")
    assert os.listdir(cache / "building") == []
