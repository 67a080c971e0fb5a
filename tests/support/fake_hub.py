"""A hub of Hugging Face on this machine: repositories, files and commits as the client's requests need them."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class FakeHub(ThreadingHTTPServer):
    """``repos``: name -> {"private", "files": {name: bytes}}; ``refuses``: a status for every commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.tokens: set[str] = set()
        self.refuses = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            repo = self.server.repos[name]
            sha = {"sha": "a" * 40, "siblings": [{"rfilename": file} for file in repo["files"]]}
            self.answer({"id": name, "private": repo["private"], **sha})
            return
        repo = self.server.repos.get("/".join(parts[:2]), {"files": {}})
        content = repo["files"].get("/".join(parts[4:]))
        if content is None:
            self.answer({}, 404, X_Error_Code="EntryNotFound")
        else:
            self.answer(content, ETag='"e"', X_Repo_Commit="a" * 40)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization", ""))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            request = json.loads(body)
            name = f"{request.get('organization') or 'user'}/{request['name']}"
            is_private = request.get("visibility", "private" if request.get("private") else "public") == "private"
            status = 409 if name in self.server.repos else 200
            self.server.repos.setdefault(name, {"private": is_private, "files": {}})
            self.answer({"url": f"{self.server.address}/{name}", "id": name}, status)
            return
        if parts == ["api", "validate-yaml"]:
            self.answer({"errors": [], "warnings": []})
            return
        repo = self.server.repos["/".join(parts[2:4])]
        if parts[4] == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif self.server.refuses:
            self.answer({"error": "no space"}, self.server.refuses)
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            repo["files"] |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            self.answer(
                {"commitUrl": f"{self.server.address}/{'/'.join(parts[2:4])}/commit/{'b' * 40}", "commitOid": "b" * 40}
            )


@contextmanager
def serving() -> Iterator[FakeHub]:
    hub = FakeHub()
    Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
