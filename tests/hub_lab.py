"""A hub of Hugging Face on this machine: what its client and timm ask of it, and its troubles.

As on the real one, a file is looked up (HEAD ``/REPO/resolve/REVISION/FILE``, with its commit,
etag and size), large files are redirected to another host, and ranges are served. `Hub.trouble` is
what the next requests for a file meet instead.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = 10_000  # bytes from which a file is kept by its checksum, on another host
PIECE = 1 << 16


class Content:
    """The bytes of a file: in memory, in a file, or made when they are asked for."""

    def __init__(
        self, size: int, read: Callable[[int, int], bytes], etag: str | None = None
    ) -> None:
        self.size, self.read, self._etag = size, read, etag

    @classmethod
    def of(cls, source: bytes | Path) -> Content:
        if isinstance(source, Path):
            source = source.read_bytes()
        data: bytes = source
        return cls(len(data), lambda start, stop: data[start:stop])

    @property
    def etag(self) -> str:
        """SHA-256 of a large file, 40 digits of a small one."""
        if self._etag is None:
            found = hashlib.sha256()
            for start in range(0, self.size, 1 << 20):
                found.update(self.read(start, min(self.size, start + (1 << 20))))
            self._etag = found.hexdigest()[: 64 if self.size >= LARGE else 40]
        return self._etag


class Hub:
    """A server with repositories; a context manager.

    ``trouble[repo, file]`` is a queue of what the next requests meet: ``("status", code,
    headers)`` on a look-up, ``("body", code, headers)`` on a download, ``("cut", n)`` and
    ``("reset", n)`` after n bytes, ``("wrong",)`` bytes, ``("trickle", bytes, seconds)``. `rate`
    is of all downloads together, in bytes per second. With `xet` large files are said to lie with
    Xet, see `connect_xet`.
    """

    def __init__(self, rate: float | None = None) -> None:
        self.repos: dict[str, dict[str, dict[str, Content]]] = {}  # commits, the newest last
        self.gated: set[str] = set()
        self.trouble: dict[tuple[str, str], deque[tuple[Any, ...]]] = defaultdict(deque)
        self.requests: list[tuple[str, str]] = []
        self.sent: dict[str, int] = defaultdict(int)
        self.rate, self._due, self._lock = rate, 0.0, threading.Lock()
        self.down = self.over = self.xet = False
        self._server = Server(("127.0.0.1", 0), type("H", (Handler,), {"hub": self}))
        self.port = self._server.server_port
        self.url, self.cdn = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def publish(self, repo: str, files: dict[str, bytes | Path | Content]) -> str:
        """Put files into a repository, as its newest commit; return the commit."""
        new = {n: f if isinstance(f, Content) else Content.of(f) for n, f in files.items()}
        told = repr((repo, [(name, file.size, id(file)) for name, file in new.items()]))
        commit = hashlib.sha1(told.encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = new
        return commit

    def find(self, repo: str) -> dict[str, dict[str, Content]] | None:
        """Return the files of each commit of a repository."""
        return self.repos.get(repo)

    def wait(self, n: int) -> None:
        """Keep to the rate."""
        if self.rate is None:
            return
        with self._lock:
            self._due = max(self._due, time.monotonic()) + n / self.rate
            due = self._due
        time.sleep(max(0.0, due - time.monotonic()))

    def downloads(self, repo: str) -> int:
        """Return how often weights of a repository were sent."""
        return sum(method == "GET" and f"/{repo}/" in path for method, path in self.requests)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Be silent about those who hang up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        if hub.down:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if path == "/":
            self.reply(200)
        elif path.startswith("/api/models/"):
            self.describe(path.removeprefix("/api/models/").partition("/revision/")[0])
        elif path.startswith("/cdn/"):
            owner, name, commit, filename = path.removeprefix("/cdn/").split("/", 3)
            repo = f"{owner}/{name}"
            self.send_file(repo, filename, (hub.find(repo) or {})[commit][filename])
        else:
            repo, _, rest = path[1:].partition("/resolve/")
            revision, _, filename = rest.partition("/")
            self.look_up(repo, revision, filename)

    def describe(self, repo: str) -> None:
        found = self.hub.find(repo)
        if found is None or self.trouble_of(repo, "", "status"):
            return self.refuse(404, "RepoNotFound") if found is None else None
        siblings, (commit, files) = [], list(found.items())[-1]
        for name, file in files.items():
            one: dict[str, Any] = {"rfilename": name, "size": file.size, "blobId": "0" * 40}
            if file.size >= LARGE:
                one["lfs"] = {"sha256": "0" * 64, "size": file.size, "pointerSize": 130}
            siblings.append(one)
        told = {"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [],
                "downloads": 0, "likes": 0, "gated": repo in self.hub.gated,
                "siblings": siblings}  # fmt: skip
        if "README.md" in files:
            card = files["README.md"]
            told["cardData"] = yaml.safe_load(card.read(0, card.size).decode().split("---")[1])
        self.reply(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def look_up(self, repo: str, revision: str, filename: str) -> None:
        if (found := self.hub.find(repo)) is None:
            return self.refuse(404, "RepoNotFound")
        if repo in self.hub.gated:
            return self.refuse(403 if self.headers["Authorization"] else 401, "GatedRepo")
        commit = list(found)[-1] if revision == "main" else revision
        if commit not in found:
            return self.refuse(404, "RevisionNotFound")
        if (file := found[commit].get(filename)) is None:
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        if self.trouble_of(repo, filename, "status"):
            return None
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"'}
        if file.size < LARGE:
            return self.send_file(repo, filename, file, headers)
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        headers |= {"Location": f"{self.hub.cdn}/cdn/{repo}/{commit}/{filename}"}
        if self.hub.xet:
            digest = hashlib.blake2b(file.etag.encode(), digest_size=32).hexdigest()
            headers |= {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": headers["Location"]}
        return self.reply(302, b"", headers)

    def send_file(
        self, repo: str, filename: str, file: Content, headers: dict[str, str] | None = None
    ) -> None:
        start, status = 0, 200
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{file.etag}"', **(headers or {})}
        if asked := self.headers["Range"]:
            start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{file.size - 1}/{file.size}"
        trouble: tuple[Any, ...] = ()
        queue = self.hub.trouble[repo, filename]
        if self.command == "GET" and queue and queue[0][0] != "status":
            trouble = queue.popleft()
        if trouble[:1] == ("body",):
            return self.reply(trouble[1], b"", trouble[2] if len(trouble) > 2 else {})
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(file.size - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.send_body(repo, file, start, trouble)

    def send_body(self, repo: str, file: Content, start: int, trouble: tuple[Any, ...]) -> None:
        kind, piece, sent = (trouble or ("",))[0], PIECE, 0
        if kind == "trickle":
            piece = trouble[1]
        self.close_connection = True
        while start < file.size and not self.hub.over:
            stop = min(start + piece, file.size)
            if kind in ("cut", "reset"):
                stop = min(stop, start + trouble[1] - sent)
            data = file.read(start, stop)
            self.hub.wait(len(data))
            if kind == "trickle":
                time.sleep(trouble[2])
            try:
                self.wfile.write(bytes(len(data)) if kind == "wrong" else data)
            except OSError:  # whoever asked has gone
                return
            start, sent = stop, sent + len(data)
            self.hub.sent[repo] += len(data)
            if kind in ("cut", "reset") and sent >= trouble[1]:
                self.wfile.flush()
                if kind == "reset":
                    now = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
                    self.connection.close()
                return
        self.close_connection = start < file.size

    def trouble_of(self, repo: str, filename: str, kind: str) -> bool:
        queue = self.hub.trouble[repo, filename]
        if not queue or queue[0][0] != kind:
            return False
        _, code, *headers = queue.popleft()
        self.reply(code, b"", headers[0] if headers else {})
        return True

    def refuse(self, code: int, why: str, headers: dict[str, str] | None = None) -> None:
        self.reply(code, b"", {"X-Error-Code": why, "X-Error-Message": why, **(headers or {})})

    def reply(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def connect(hub: Hub, cache: Path, patch: Any) -> None:
    """Have this process take a hub for the real one, with an empty cache."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    from sfda_tune.data.hub import forget_reachable

    cache.mkdir(parents=True, exist_ok=True)
    patch.setattr(constants, "ENDPOINT", hub.url)
    address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setenv("HF_ENDPOINT", hub.url)
    patch.setenv("HF_HUB_CACHE", str(cache))
    patch.setenv("HF_HUB_OFFLINE", "0")
    close_session()
    forget_reachable()


def connect_xet(hub: Hub, patch: Any) -> None:
    """Have large files come by Xet: what its own client would fetch comes by HTTP.

    All that the client of the hub does before and after, where there is a store of all contents
    (from version 2.2 or so on), is its own.
    """
    from huggingface_hub import file_download

    def get(*, incomplete_path: Path, xet_file_data: Any, expected_size: int | None = None,
            **more: Any) -> None:  # fmt: skip
        with incomplete_path.open("wb") as file:
            file_download.http_get(
                xet_file_data.refresh_route, file, expected_size=expected_size,
                tqdm_class=more.get("tqdm_class"),
            )  # fmt: skip

    hub.xet = True
    patch.setattr(file_download, "xet_get", get)
