"""A stand-in for the model hub, in a thread on the loopback address: serves FOLDER/NAME as `fake/NAME`."""

from __future__ import annotations

import hashlib
import json
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Self


class Loopback(ThreadingHTTPServer):
    """A server in a thread, at a free port of the loopback address."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Until the context is left."""
        thread = Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    """Says nothing on the terminal."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Stand(Loopback):
    """`fetched` are the files that were asked for, in order; `commit` is what the branch `main` points to."""

    def __init__(self, root: Path) -> None:
        super().__init__(_Handler)
        self.root, self.commit = root, "a" * 40
        self.fetched: list[str] = []


class _Handler(Handler):
    server: Stand

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) > 3:
            return self.about(self.server.root / parts[3], "tree" in parts)
        if len(parts) > 4 and parts[2] == "resolve" and (self.server.root / parts[1]).is_dir():
            return self.file(self.server.root / parts[1], "/".join(parts[4:]), parts[3])
        return self.reply(404, X_Error_Code="RepoNotFound")

    def about(self, folder: Path, is_tree: bool) -> None:
        if not folder.is_dir():
            return self.reply(404, X_Error_Code="RepoNotFound")
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        tree = [
            {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path.read_bytes())}
            for name, path in files.items()
        ]
        siblings = [{"rfilename": name} for name in files]
        answer = {"id": f"fake/{folder.name}", "sha": self.server.commit, "siblings": siblings}
        return self.reply(200, json.dumps(tree if is_tree else answer).encode(), Content_Type="application/json")

    def file(self, folder: Path, name: str, revision: str) -> None:
        if not (folder / name).is_file():
            return self.reply(404, X_Error_Code="EntryNotFound")
        body = (folder / name).read_bytes()
        if self.command == "GET":
            self.server.fetched.append(name)
        commit = self.server.commit if revision == "main" else revision
        return self.reply(200, body, ETag=f'"{_digest(body)}"', X_Repo_Commit=commit, Accept_Ranges="bytes")


def _digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@contextmanager
def hub_of(root: Path) -> Iterator[Stand]:
    """The hub, until the context is left."""
    with Stand(root).running() as stand:
        yield stand
