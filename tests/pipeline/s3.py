"""An S3 server on loopback, behind a proxy that counts requests and injects faults.

The server is moto's: it speaks the protocol that pyarrow's client speaks to any S3, signatures, multi-part uploads and
listings included, comes from the package index, and starts in a few milliseconds.
"""

import functools
import http.client
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tests.pipeline.faults import Proxy, fronted

BUCKET = "bucket"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "eu-west-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@functools.cache
def _server() -> tuple[str, int]:
    """Address of the one server of this process; it ends with the process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # it would print a stack for each upload that is lost
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    return server.get_host_and_port()


@contextmanager
def served() -> Iterator[Proxy]:
    """A server with an empty bucket, behind a proxy that ends with the block."""
    upstream = _server()
    _ask(upstream, "POST", "/moto-api/reset")
    _ask(upstream, "PUT", f"/{BUCKET}")
    with fronted(upstream) as proxy:
        yield proxy


def _ask(address: tuple[str, int], method: str, path: str) -> None:
    connection = http.client.HTTPConnection(*address)
    connection.request(method, path, b"", {"Authorization": "AWS4-HMAC-SHA256 Credential=t/1/us-east-1/s3/x"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    connection.close()
