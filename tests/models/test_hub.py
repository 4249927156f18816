"""The hub's client against a small server of our own, in a process of its own (its address is read at import)."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from zoo.models.hub import cached_snapshot

COMMIT = "a" * 40
NEEDED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}
UNNEEDED = {"pytorch_model.bin", "consolidated.safetensors", "onnx/model.json", "modeling_own.py"}

PROGRAM = """
import json, sys
from zoo.errors import ZooError
from zoo.models.loading import _resolve
for ref in sys.argv[1:]:
    try:
        place = _resolve(ref, None, False)
        print(json.dumps([ref, place.revision, place.facts["source"]]))
    except ZooError as error:
        print(json.dumps([ref, type(error).__name__, str(error)]))
"""


@pytest.fixture
def hub() -> Iterator[str]:
    """Serves ``owner/model`` (with files nobody needs) and ``owner/gated``; returns its address."""
    files = {name: name.encode() for name in (*NEEDED, *UNNEEDED)}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def reply(self, body: bytes, code: int = 200, **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path.startswith(("/api/models/owner/model", "/api/models/owner/gated")):
                listing = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                if "/revision/nope" in path:
                    return self.reply(b"{}", 404, X_Error_Code="RevisionNotFound")
                info = {
                    "id": "owner/model",
                    "sha": COMMIT,
                    "siblings": [{"rfilename": name} for name in files],
                }
                return self.reply(json.dumps(listing if "/tree/" in path else info).encode())
            if path.startswith("/owner/gated/resolve/"):
                return self.reply(b"{}", 403, X_Error_Code="GatedRepo")
            name = path.removeprefix(f"/owner/model/resolve/{COMMIT}/")
            if name in files:
                etag = hashlib.sha1(files[name]).hexdigest()
                return self.reply(files[name], ETag=etag, X_Repo_Commit=COMMIT)
            return self.reply(b"{}", 404, X_Error_Code="RepoNotFound")

        def do_HEAD(self) -> None:
            self.do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def load(home: Path, endpoint: str, *refs: str, **more: str) -> list[list[str]]:
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **more}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *refs], capture_output=True, text=True, env=environment, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_fetched_once_and_then_offline(hub: str, tmp_path: Path) -> None:
    home = tmp_path / "hf"
    missing = load(home, hub, "owner/model", "owner/model@nope", "owner/nothing", "owner/gated")
    assert missing[0] == ["owner/model", COMMIT, "hub"]
    assert missing[1][1:] == ["ModelNotFound", "owner/model has no revision 'nope'"]
    assert missing[2][1] == "ModelNotFound"
    assert "no public model called owner/nothing" in missing[2][2]
    assert missing[3][1:] == [
        "ModelNotFound",
        "owner/gated is gated: accept its terms on the hub, then run: hf auth login",
    ]
    assert {path.name for path in home.rglob("snapshots/*/*")} == NEEDED

    offline = load(home, hub, "owner/model", f"owner/model@{COMMIT}", "owner/other", HF_HUB_OFFLINE="1")
    assert offline[:2] == [["owner/model", COMMIT, "hub"], [f"owner/model@{COMMIT}", COMMIT, "hub"]]
    assert offline[2] == [
        "owner/other",
        "HubUnreachable",
        "owner/other is not in the hub's local cache, and HF_HUB_OFFLINE is set",
    ]


def test_a_hub_that_never_answers_costs_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        rows = load(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", "owner/model")
        assert time.monotonic() - began < 20  # imports included, on a busy machine
    assert rows[0][1] == "HubUnreachable"


@pytest.mark.parametrize(
    ("files", "complete"),
    [
        (["config.json", "model.safetensors"], True),
        (["config.json"], False),
        (["model.safetensors"], False),
        (["config.json", "model-00001-of-00002.safetensors"], False),
        (["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"], False),
        (
            [
                "config.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
            True,
        ),
    ],
)
def test_half_a_download_is_not_taken_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], complete: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--model"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for name in files:
        (snapshot / name).write_text("")
    if "model.safetensors.index.json" in files:
        shards = {f"layer{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert cached_snapshot("owner/model") == (snapshot if complete else None)
