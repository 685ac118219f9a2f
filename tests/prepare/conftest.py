"""A web server on loopback that can misbehave, and small archives in the published layouts."""

from __future__ import annotations

import hashlib
import io
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Protocol

import pytest
from PIL import Image
from rich.console import Console

from cl_bench.data.published import imagenet100
from cl_bench.prepare.archives import Archive
from cl_bench.prepare.download import Patience

Fault = str | tuple[str, int]


class Server:
    """Serves files and records requests; ``faults`` are the faults of the next responses, in order.

    ``("cut", n)`` closes the connection after n bytes; ``("stall", n)`` sends nothing after n bytes;
    ``("announce", n)`` announces n bytes more, or fewer, than it sends; ``no ranges`` sends the whole file;
    ``("drip", n)`` sends a byte every n milliseconds, and ``("drip headers", n)`` does so with its headers;
    ``wrong range`` sends another range; ``("status", n)`` refuses with status n; ``("more", n)`` appends n
    bytes.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.ranges: list[str | None] = []
        self.stalled = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/some/where/{name}"

    def close(self) -> None:
        self.stalled.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        fault = self.faults.pop(0) if self.faults else ""
        kind, number = fault if isinstance(fault, tuple) else (fault, 0)
        content = self.files.get(request.path.rpartition("/")[2])
        if kind == "drip headers":
            self.drip(request, b"HTTP/1.1 200 OK\r\nX-Endless: " + b"x" * 10_000, number)
            return
        if kind == "status" or content is None:
            request.send_error(number or 404)
            return
        content += bytes(number) if kind == "more" else b""
        start = 0
        if asked and kind != "no ranges":
            start = int(re.match(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
            start += 1 if kind == "wrong range" else 0
            if start >= len(content):
                request.send_error(416)
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            request.send_response(200)
        body = content[start:]
        announced = len(body) + (number if kind == "announce" else 0)
        request.send_header("Content-Length", str(announced))
        request.end_headers()
        if kind == "drip":
            self.drip(request, body, number)
            return
        if kind in ("cut", "stall"):
            body = body[:number]
        request.wfile.write(body[:announced])
        request.wfile.flush()
        if kind == "stall":
            self.stalled.wait(5)
        if kind in ("cut", "stall") or announced > len(body):
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)

    def drip(self, request: BaseHTTPRequestHandler, content: bytes, milliseconds: int) -> None:
        """Send one byte after the other until the client leaves or the test ends."""
        request.close_connection = True
        try:
            for number in range(len(content)):
                request.wfile.write(content[number : number + 1])
                request.wfile.flush()
                if self.stalled.wait(milliseconds / 1000):
                    return
        except OSError:
            pass


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    yield served
    served.close()


@pytest.fixture
def patience() -> Patience:
    return Patience(seconds=0.3, attempts=3, pause=0.01, least=1)


class Publish(Protocol):
    def __call__(self, name: str, content: bytes, unpacks: str = "") -> Archive: ...


@pytest.fixture
def publish(server: Server) -> Publish:
    """Put a file on the server, and return its published description."""

    def published(name: str, content: bytes, unpacks: str = "") -> Archive:
        server.files[name] = content
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        return Archive(
            server.url(name), len(content), md5, hashlib.sha256(content).hexdigest(), unpacks=unpacks
        )

    return published


@pytest.fixture(scope="session")
def jpeg() -> Callable[[int], bytes]:
    """A tiny picture, whose colour encodes a number."""

    def encoded(number: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (12, 10), (number % 256, number // 256 % 256, 100)).save(buffer, "jpeg")
        return buffer.getvalue()

    return encoded


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def small_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let classes of ImageNet be complete with a few images."""
    for split in ("train", "val"):
        monkeypatch.setitem(imagenet100.PER_CLASS, split, range(1, 4))
