"""The model hub as those see it who upload to it, in a thread on the loopback address: what huggingface_hub's client
asks without xet. `tests/hub_stand_in.py` is what those see who download.
"""

from __future__ import annotations

import base64
import hashlib
import json
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hub_stand_in import Handler, Loopback


@dataclass
class Repository:
    """What is in it: name → bytes; `large` are the names of those that came by LFS; `commits`: what each changed."""

    private: bool = False
    may_write: bool = True
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    large: set[str] = field(default_factory=set)
    commits: list[dict[str, list[str]]] = field(default_factory=list)


class Stand(Loopback):
    """`me` may write under its own name and those of its organisations. The first request whose path contains `fails`
    is answered by `status` and nothing else, or not at all; `asked` has all requests, `stored` what was uploaded by
    LFS, by digest.
    """

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.token: str | None = "hf_secret"
        self.role = "write"
        self.orgs = [{"name": "lab", "roleInOrg": "write"}, {"name": "guests", "roleInOrg": "read"}]
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.fails = ""
        self.status: int | None = None


class _Handler(Handler):
    server: Stand

    def reply(self, status: int, answer: Any = None, **headers: str) -> None:
        super().reply(status, json.dumps(answer or {}).encode(), Content_Type="application/json", **headers)

    def answer(self) -> None:
        """One request; what has no method below is answered by 404."""
        hub, path = self.server, urllib.parse.urlparse(self.path).path
        body = self.body()
        hub.asked.append(f"{self.command} {path}")
        if hub.fails and hub.fails in path:
            hub.fails = ""
            if hub.status is None:
                self.close_connection = True
                return None
            return self.reply(hub.status, {"error": "as the test wants it"})
        if self.command == "HEAD":
            return self.reply(200)
        if path.startswith("/lfs/"):
            hub.stored[path.removeprefix("/lfs/")] = body
            return self.reply(200)
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.reply(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/whoami-v2":
            token = {"accessToken": {"role": hub.role}}
            return self.reply(200, {"name": "me", "orgs": hub.orgs, "auth": token})
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
        if name not in hub.repositories:
            return self.reply(404, X_Error_Code="RepoNotFound")
        repository, action = hub.repositories[name], parts[4:] if parts[0] == "api" else parts[2:]
        if action[:1] in (["auth-check"], ["commit"]) and not repository.may_write:
            return self.reply(403, {"error": "Forbidden"})
        known = {
            "": self.about,
            "revision": self.about,
            "auth-check": self.done,
            "preupload": self.modes,
            "info": self.batch,
        }
        return {**known, "commit": self.commit}[(action or [""])[0]](repository, body)

    def body(self) -> bytes:
        """What a request brings, in chunks or whole."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def done(self, repository: Repository, body: bytes) -> None:
        self.reply(200)

    def create(self, asked: dict[str, Any]) -> None:
        owner, hub = asked.get("organization") or "me", self.server
        name = f"{owner}/{asked['name']}"
        if owner not in ("me", *(one["name"] for one in hub.orgs if one["roleInOrg"] != "read")):
            return self.reply(403, {"error": "You don't have the rights to create a model under this namespace"})
        if name in hub.repositories:
            return self.reply(409, {"error": "You already created this model repo", "url": f"{hub.address}/{name}"})
        hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        return self.reply(200, {"url": f"{hub.address}/{name}", "name": name})

    def about(self, repository: Repository, body: bytes) -> None:
        siblings: list[dict[str, Any]] = []
        for name, content in repository.files.items():
            siblings.append({"rfilename": name, "size": len(content), "blobId": git_digest(content)})
            if name in repository.large:
                siblings[-1]["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 1}
        self.reply(200, {"id": "x/y", "sha": "a" * 40, "private": repository.private, "siblings": siblings})

    def modes(self, repository: Repository, body: bytes) -> None:
        """Weights are large files, the rest is not."""
        found = []
        for one in json.loads(body)["files"]:
            name, is_large = one["path"], one["path"].endswith(".safetensors")
            content = repository.files.get(name)
            oid = content and (sha256(content) if is_large else git_digest(content))
            mode = "lfs" if is_large else "regular"
            found.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": found})

    def batch(self, repository: Repository, body: bytes) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.server.address}/lfs/{one['oid']}"}}}
            objects.append({**one, **({} if one["oid"] in self.server.stored else upload)})
        self.reply(200, {"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, body: bytes) -> None:
        changed: dict[str, list[str]] = {"added": [], "deleted": []}
        for line in body.decode().splitlines():
            key, value = (one := json.loads(line))["key"], one["value"]
            if key == "deletedFile":
                del repository.files[value["path"]]
                changed["deleted"].append(value["path"])
            elif key in ("file", "lfsFile"):
                is_large = key == "lfsFile"
                content = self.server.stored[value["oid"]] if is_large else base64.b64decode(value["content"])
                repository.files[value["path"]] = content
                (repository.large.add if is_large else repository.large.discard)(value["path"])
                changed["added"].append(value["path"])
        repository.commits.append(changed)
        oid = f"{len(repository.commits):040d}"
        self.reply(200, {"commitUrl": f"{self.server.address}/x/y/commit/{oid}", "commitOid": oid})


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def hub_to_push_to() -> Iterator[Stand]:
    """The hub, until the context is left."""
    with Stand().running() as stand:
        yield stand
