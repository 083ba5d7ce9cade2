"""A proxy in front of a server on loopback, that counts requests and injects faults."""

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Request:
    """One request as it came to the proxy."""

    method: str
    path: str
    """With the query."""
    bytes: int
    """Of its body."""
    range: str | None = None
    signed: bool = False


@dataclass(frozen=True)
class Fault:
    """What happens to the requests that it is meant for: the first `times` of them, after the first `spared`."""

    kind: str
    """cut: the response ends in the middle of its body; lost: half of the request reaches the server, then the
    connection ends; slow: `seconds` pass first; hang: nothing comes, ever; a number: the server's status."""
    method: str = "GET"
    part: str = ""
    """Of the path."""
    times: int = 1
    spared: int = 0
    seconds: float = 0.0


@dataclass
class Proxy:
    """Requests so far, and the faults that are due."""

    endpoint: str
    requests: list[Request] = field(default_factory=list)
    injected: list[tuple[str, Request]] = field(default_factory=list)
    """The faults that happened."""
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    seen: dict[Fault, int] = field(default_factory=dict)

    def inject(self, *faults: Fault) -> None:
        """From now on these faults and no others."""
        with self.lock:
            self.faults, self.seen, self.injected = list(faults), {}, []

    def due(self, request: Request) -> Fault | None:
        """What is to happen to this request."""
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if request.method != fault.method or fault.part not in request.path:
                    continue
                number = self.seen[fault] = self.seen.get(fault, 0) + 1
                if fault.spared < number <= fault.spared + fault.times:
                    self.injected.append((fault.kind, request))
                    return fault
        return None

    @contextmanager
    def recorded(self) -> Iterator[list[Request]]:
        """The requests of a block."""
        before = len(self.requests)
        made: list[Request] = []
        yield made
        made += self.requests[before:]


class _Front(ThreadingHTTPServer):
    """Where the clients connect to."""

    daemon_threads = True

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.ended = upstream, threading.Event()
        self.proxy = Proxy(f"http://127.0.0.1:{self.server_port}")


class _Handler(BaseHTTPRequestHandler):
    server: _Front
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format, *args):  # noqa: A002
        pass

    def do(self):
        body = self._body()
        signed = "Authorization" in self.headers
        fault = self.server.proxy.due(Request(self.command, self.path, len(body), self.headers.get("Range"), signed))
        kind = fault.kind if fault else ""
        if kind in ("slow", "hang"):
            self.server.ended.wait(fault.seconds if kind == "slow" else None)
        if kind == "hang":
            self.close_connection = True
        elif kind == "lost":
            self._lose(body)
        elif kind.isdigit():
            self._answer(int(kind), {}, b"<Error><Code>InternalError</Code></Error>")
        else:
            self._forward(body, cut=kind == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do  # noqa: N815

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while length := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        del self.headers["Transfer-Encoding"]
        self.headers["Content-Length"] = str(sum(map(len, pieces)))
        return b"".join(pieces)

    def _lose(self, body):
        """Half of the request goes on to the server, then both connections end."""
        with socket.create_connection(self.server.upstream) as server:
            lines = [f"{self.command} {self.path} HTTP/1.1", *(f"{k}: {v}" for k, v in self.headers.items())]
            server.sendall("\r\n".join([*lines, "", ""]).encode() + body[: len(body) // 2])
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _forward(self, body, cut):
        server = http.client.HTTPConnection(*self.server.upstream, timeout=120)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        server.request(self.command, self.path, body, headers)
        answer = server.getresponse()
        data = answer.read()
        server.close()
        self._answer(answer.status, dict(answer.getheaders()), data, cut)

    def _answer(self, status, headers, data, cut=False):
        self.send_response_only(status)
        kept = {n: v for n, v in headers.items() if n.lower() not in ("connection", "transfer-encoding")}
        if self.command != "HEAD" and status != 204:
            kept = {n: v for n, v in kept.items() if n.lower() != "content-length"}
            kept["Content-Length"] = str(len(data))
        for name, value in kept.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True


@contextmanager
def fronted(upstream: tuple[str, int]) -> Iterator[Proxy]:
    """A proxy of the server at this address, which ends with the block."""
    front = _Front(upstream)
    threading.Thread(target=front.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield front.proxy
    finally:
        front.ended.set()
        front.shutdown()
        front.server_close()
