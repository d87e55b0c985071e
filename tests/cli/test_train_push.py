"""`braces train --push-to-hub`, with a hub on loopback."""

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants


class Hub(BaseHTTPRequestHandler):
    """Minimal hub API for uploads and downloads of small files, over a dict of files."""

    files: dict[str, bytes] = {}  # noqa: RUF012  one hub a test
    tokens: list[str | None] = []  # noqa: RUF012
    sha = "0123456789" * 4

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, value: Any, code: int = 200) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {
            "Content-Type": "application/json", "Content-Length": str(len(body)), "X-Repo-Commit": self.sha,
            "ETag": f'"{hash(body) & 0xFFFFFFFF:x}"',
        }.items():  # fmt: skip
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            self.tokens.append(self.headers.get("Authorization"))
            known = self.headers.get("Authorization") == "Bearer hf_good"
            self.reply({"name": "ann", "type": "user"} if known else {"error": "no"}, 200 if known else 401)
        elif "/tree/" in path:
            self.reply(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": f"{index:040x}"}
                    for index, (name, content) in enumerate(self.files.items())
                ]
            )
        elif "/resolve/" in path:
            name = path.rpartition("/")[2]
            self.reply(self.files.get(name, b""), 200 if name in self.files else 404)
        else:
            self.reply({"id": "ann/film", "sha": self.sha, "siblings": [{"rfilename": name} for name in self.files]})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        host = f"http://localhost:{self.server.server_address[1]}"  # type: ignore[index]
        if self.path == "/api/repos/create":
            self.reply({"url": f"{host}/ann/film", "id": "ann/film", "name": "ann/film"})
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            given = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in given]
            self.reply({"files": modes})
        else:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.reply({"commitOid": self.sha, "commitUrl": f"{host}/ann/film/commit/{self.sha}", "success": True})


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[type[Hub]]:
    """A hub on loopback, with an empty cache and a valid token."""
    Hub.files, Hub.tokens = {}, []
    server = ThreadingHTTPServer(("localhost", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://localhost:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    yield Hub
    server.shutdown()
    server.server_close()


def test_an_adapter_goes_to_the_hub_and_comes_back(train, braces, hub, tmp_path):
    """--push-to-hub uploads adapter, card and curve only; --adapter OWNER/NAME loads the adapter."""
    outcome = train(tmp_path / "out", "--max-steps", 2, "--push-to-hub", "ann/film", "--logging-steps", 1)
    assert outcome.code == 0, outcome.err
    assert set(hub.files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png", "metrics.jsonl",
    }  # fmt: skip
    for name, content in hub.files.items():
        assert content == (tmp_path / "out" / name).read_bytes()
    found = braces("inspect", "--adapter", "ann/film", "--format", "json")
    assert found.code == 0, found.err
    local = braces("inspect", "--adapter", tmp_path / "out", "--format", "json")
    assert found.json["layers"] == local.json["layers"]


def test_a_push_that_cannot_work_is_refused_before_training(train, hub, monkeypatch, tmp_path):
    """A bad name, an unknown token, no network: exit 2, nothing written."""
    assert "is not a repository" in train(tmp_path / "out", "--max-steps", 2, "--push-to-hub", "a/b/c").err
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_bad")
        refused = train(tmp_path / "out", "--max-steps", 2, "--push-to-hub", "ann/film")
    assert refused.code == 2
    assert "HF_TOKEN" in refused.err
    assert hub.tokens == ["Bearer hf_bad"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused = train(tmp_path / "out", "--max-steps", 2, "--push-to-hub", "ann/film")
    assert refused.code == 2
    assert "HF_HUB_OFFLINE" in refused.err
    assert not (tmp_path / "out").exists()


def test_a_push_that_fails_keeps_the_adapter_and_is_tried_again(train, hub, monkeypatch, tmp_path):
    """Exit 1 after training; --resume uploads the adapter."""
    with monkeypatch.context() as patch:
        patch.setattr(Hub, "do_POST", lambda self: self.reply({"error": "out of order"}, 400))
        outcome = train(tmp_path / "out", "--max-steps", 2, "--push-to-hub", "ann/film")
    assert outcome.code == 1
    assert "--resume tries the upload again" in outcome.err
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert train(tmp_path / "out", "--max-steps", 2, "--push-to-hub", "ann/film", "--resume").code == 0
    assert "adapter_config.json" in hub.files
