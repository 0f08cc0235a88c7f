"""A Hugging Face hub on this machine: the part of its protocol that is spoken here, and the faults it can have."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository and what goes wrong with it."""

    files: dict[str, bytes]
    repo_id: str = "org/model"
    commit: str = COMMIT
    gated_for: str | None = None
    """The only token that is let in."""
    forbidden: bool = False
    cut: dict[str, int] = field(default_factory=dict)
    """File -> bytes after which its connection breaks, once."""
    spoiled: dict[str, bytes] = field(default_factory=dict)
    """File -> what is served instead of it."""
    extra: list[str] = field(default_factory=list)
    """Names that are listed besides."""
    served: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """File -> (first byte, bytes) of each answer."""
    tokens: set[str] = field(default_factory=set)
    """What came as Authorization."""
    writers: tuple[str, ...] = ()
    """Tokens that may write."""
    private: bool | None = None
    """None: there is no such repository yet."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """sha256 -> what was uploaded."""
    endpoint: str = ""

    def describe(self, name: str) -> dict[str, Any]:
        """A file as the API lists it: large ones lie in LFS."""
        content = self.files.get(name, b"")
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"size": len(content), "oid": git, "blobId": git}
        if name.endswith((".safetensors", ".bin", ".model")):
            sha = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha, "oid": sha, "size": len(content), "pointerSize": 130}
        return entry


def of_folder(folder: Path, **options: Any) -> Hub:
    """A hub with the files of a folder."""
    return Hub({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}, **options)


def serve(hub: Hub) -> ThreadingHTTPServer:
    """Start it on a free port of the loopback interface; shut it down when done."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def fail(self, status: int, code: str = "", message: str = "") -> None:
            body = json.dumps({"error": message or code, "url": f"{hub.endpoint}/{hub.repo_id}"}).encode()
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message or code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def allowed(self, repo_id: str, revision: str) -> bool:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token:
                hub.tokens.add(token)
            if repo_id != hub.repo_id:
                self.fail(404 if token else 401, "RepoNotFound", "Repository not found")
            elif token == "expired":
                self.fail(401, message="Invalid credentials in Authorization header")
            elif hub.gated_for is not None and token != hub.gated_for:
                self.fail(403 if token else 401, "GatedRepo", "Access to model org/model is restricted.")
            elif hub.forbidden:
                self.fail(403, message="You need a token with more rights")
            elif revision not in ("main", hub.commit):
                self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            else:
                return True
            return False

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_PUT(self) -> None:
            content = b""
            if "Content-Length" in self.headers:
                content = self.rfile.read(int(self.headers["Content-Length"]))
            else:  # in chunks, each behind its length
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            hub.objects[self.path.rpartition("/")[2]] = content
            self.reply({})

        def do_POST(self) -> None:
            path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers["Content-Length"]))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            hub.tokens |= {token} - {""}
            if path == "/api/validate-yaml":
                self.reply({"errors": [], "warnings": []})
            elif token not in hub.writers:
                self.fail(403 if token else 401, message="You don't have the rights to create a model")
            elif path == "/api/repos/create":
                self.create(json.loads(body))
            elif path == f"/api/models/{hub.repo_id}/preupload/main":
                self.reply({"files": [self.mode(file["path"]) for file in json.loads(body)["files"]]})
            elif path == f"/{hub.repo_id}.git/info/lfs/objects/batch":
                self.reply({"objects": [self.place(one) for one in json.loads(body)["objects"]]})
            elif path == f"/api/models/{hub.repo_id}/commit/main":
                for line in body.splitlines():
                    self.commit(json.loads(line))
                self.reply({"commitUrl": f"{hub.endpoint}/{hub.repo_id}/commit/1", "commitOid": hub.commit})
            else:
                self.fail(404, message=f"no route for {path}")

        def create(self, asked: dict[str, Any]) -> None:
            if hub.private is not None:
                self.fail(409, message="You already created this model repo")
                return
            hub.private = asked.get("visibility") == "private" or asked.get("private") is True
            self.reply({"url": f"{hub.endpoint}/{hub.repo_id}", "id": "1", "name": hub.repo_id})

        def mode(self, name: str) -> dict[str, Any]:
            large = name.endswith((".safetensors", ".model"))
            return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

        def place(self, one: dict[str, Any]) -> dict[str, Any]:
            return {**one, "actions": {"upload": {"href": f"{hub.endpoint}/upload/{one['oid']}"}}}

        def commit(self, line: dict[str, Any]) -> None:
            value = line["value"]
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.objects[value["oid"]]

        def reply(self, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            kind = "vnd.git-lfs+json" if "objects" in content else "json"
            self.send_header("Content-Type", f"application/{kind}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)(?:/.*)?", path):
                if self.allowed(found[1], found[3]):
                    self.list_files(tree=found[2] == "tree")
            elif path == f"/api/models/{hub.repo_id}" and hub.private is not None:
                self.list_files(tree=False)
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                if self.allowed(found[1], found[2]):
                    self.file(found[3])
            else:
                self.fail(404, message=f"no route for {path}")

        def list_files(self, tree: bool) -> None:
            names = [*hub.files, *hub.extra]
            if tree:
                content: Any = [{"type": "file", "path": name, **hub.describe(name)} for name in names]
            else:
                siblings = [{"rfilename": name, **hub.describe(name)} for name in names]
                content = {"_id": "1", "id": hub.repo_id, "modelId": hub.repo_id, "sha": hub.commit}
                content |= {"private": bool(hub.private), "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
            self.reply(content)

        def file(self, name: str) -> None:
            if name not in hub.files:
                self.fail(404, "EntryNotFound", "Entry not found")
                return
            entry, body = hub.describe(name), hub.spoiled.get(name, hub.files[name])
            start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", hub.commit)
            self.send_header("ETag", f'"{entry["oid"]}"')
            if "lfs" in entry:
                self.send_header("X-Linked-Etag", f'"{entry["lfs"]["sha256"]}"')
                self.send_header("X-Linked-Size", str(entry["size"]))
            self.send_header("Accept-Ranges", "bytes")
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            if self.command == "HEAD":
                return
            end = hub.cut.pop(name, len(body))
            hub.served.setdefault(name, []).append((start, max(0, end - start)))
            self.wfile.write(body[start:end])
            if end < len(body):
                self.wfile.flush()
                self.connection.shutdown(2)
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
