"""A server of Google's storage protocol on loopback, behind a proxy that injects faults, in a process of their own.

The server is an emulator from the package index, whose handlers run in threads here: pyarrow's client leaves one answer
half read while it asks for another. And it waits for some answers while it holds Python's lock, so that nothing in its
own process could give them.
"""

import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from multiprocessing.connection import Connection

from tests.pipeline.faults import Fault, Request, fronted

BUCKET = "bucket"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Clients that leave in the middle of an answer are no errors."""


@dataclass(frozen=True)
class Remote:
    """The proxy of the other process."""

    endpoint: str
    line: Connection

    def inject(self, *faults: Fault) -> list[tuple[str, Request]]:
        """From now on these faults and no others. Returns the earlier ones that happened."""
        self.line.send(faults)
        return self.line.recv()


def _serve(line: Connection) -> None:
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    storage = Storage(use_memory_fs=True)
    storage.create_bucket(BUCKET, {})
    server = _Server(("127.0.0.1", 0), partial(RequestHandler, storage))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with fronted(server.server_address) as proxy:
        line.send(proxy.endpoint)
        while (faults := line.recv()) is not None:
            injected = proxy.injected
            proxy.inject(*faults)
            line.send(injected)


@contextmanager
def served() -> Iterator[Remote]:
    """A server with an empty bucket, which ends with the block."""
    spawn = multiprocessing.get_context("spawn")
    line, other = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(other,), daemon=True)
    process.start()
    try:
        yield Remote(line.recv(), line)
    finally:
        line.send(None)
        process.join(10)
        process.kill()


def environment(remote: Remote) -> dict[str, str]:
    """What leads clients there."""
    return {"CLOUD_STORAGE_EMULATOR_ENDPOINT": remote.endpoint, "GS_NO_SIGN_REQUEST": "YES"}
