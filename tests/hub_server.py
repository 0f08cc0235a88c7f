"""A Hugging Face hub on this machine: the part of its protocol that a download speaks, and the faults it can have."""

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
            body = json.dumps({"error": message or code}).encode()
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

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)(?:/.*)?", path):
                if self.allowed(found[1], found[3]):
                    self.list_files(tree=found[2] == "tree")
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
                content = {"_id": "1", "id": hub.repo_id, "modelId": hub.repo_id, "sha": hub.commit, "private": False}
                content |= {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

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
