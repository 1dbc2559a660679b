"""A stand-in for the Hugging Face hub, over HTTP: it takes what the real client sends.

Loaded as a plugin by `conftest.py`, so that `hub` is there for every test.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub.constants
import pytest

COMMIT = "https://huggingface.co/me/mine/commit/1"


class Hub(BaseHTTPRequestHandler):
    """Takes what a repository is made of; programs are uploaded apart, as large files are."""

    files: dict[str, bytes]
    asked: list[str]
    tokens: set[str | None]
    made: list[dict[str, Any]]
    stored: dict[str, bytes]
    refuses = ""
    status = 403

    def do_GET(self) -> None:
        if self.made:
            self.answer({"id": "me/mine"})
        else:
            self.answer({"error": "none"}, 404, "RepoNotFound")

    def do_PUT(self) -> None:
        content = self.body()
        if self.refused():
            return
        self.stored[self.path.rpartition("/")[2]] = content
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        self.tokens.add(self.headers.get("Authorization"))
        if self.refused():
            return
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            name = self.made[-1]["name"]
            self.answer({"url": f"{huggingface_hub.constants.ENDPOINT}/me/{name}"})
        elif "/preupload/" in self.path:
            names = [each["path"] for each in json.loads(body)["files"]]
            modes = [
                {
                    "path": name,
                    "uploadMode": "lfs" if name.endswith(".pte") else "regular",
                    "shouldIgnore": False,
                }
                for name in names
            ]
            self.answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.answer({"transfer": "basic", "objects": self.places(json.loads(body)["objects"])})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        else:
            self.commit([json.loads(line) for line in body.split(b"\n") if line])

    def refused(self) -> bool:
        self.asked.append(self.path)
        refused = bool(self.refuses) and self.refuses in self.path
        if refused:
            self.answer({"error": "no space for you"}, self.status)
        return refused

    def places(self, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
        at = f"{huggingface_hub.constants.ENDPOINT}/put"
        return [
            {**each, "actions": {"upload": {"href": f"{at}/{each['oid']}", "header": {}}}}
            for each in objects
        ]

    def commit(self, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]
        self.answer({"commitUrl": COMMIT, "commitOid": "1", "success": True})

    def body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def answer(self, value: Any, code: int = 200, wrong: str = "") -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Error-Code", wrong)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The only hub that the client knows."""
    empty: dict[str, Any] = {"files": {}, "asked": [], "tokens": set(), "made": [], "stored": {}}
    handler = type("OneHub", (Hub,), empty)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # What is stored in pieces has a protocol of its own, that of files is asked for instead.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    yield handler
    server.shutdown()
    server.server_close()
