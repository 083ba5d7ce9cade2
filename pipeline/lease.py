"""One process at a time on one piece of work: a file with a heartbeat, on any storage. It saves work, nothing more.

Storage promises neither an atomic creation nor a common clock. So whoever finds a lease watches it: where it changes,
its holder is alive; where it stays as it is for DEAD_SECONDS, the holder is dead and the lease is taken over. Two
processes that begin in the same moment may both hold it: they write the same bytes under the same names, and nothing
breaks.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.progress import say
from pipeline.storage import Location

BEAT_SECONDS = 5.0
"""Between two signs of life of a holder."""

DEAD_SECONDS = 30.0
"""Without a sign of life a holder is taken for dead after this; on the same machine it is seen at once."""

_LOOK_SECONDS = 0.25


class Held(RuntimeError):
    """Another process is at work on the same; the message says which."""


@contextmanager
def held(location: Location, staging: Location, job: str) -> Iterator[None]:
    """Hold the lease in the file `location` while the block runs.

    Args:
        staging: a folder on the same storage, for what is being written.
        job: what the messages call the work.

    Raises: Held where another process shows signs of life; StorageError.
    """
    _wait_for_the_dead(location, job)
    mine = {"holder": uuid.uuid4().hex, "host": platform.node(), "process": os.getpid(), "machine": _machine()}
    _write(location, staging, mine, 0)
    done = threading.Event()
    heart = threading.Thread(target=_beat, args=(location, staging, mine, done), daemon=True)
    heart.start()
    try:
        yield
    finally:
        done.set()
        heart.join()
        if _holder(_read(location)) == mine["holder"]:
            location.delete()


def _wait_for_the_dead(location: Location, job: str) -> None:
    """Return once nobody holds the lease. Raises: Held."""
    found = _read(location)
    if not found or _is_gone(found):
        return
    who = f"process {found.get('process')} on {found.get('host')}"
    say(f"{job}: {who} is at work on this, or died at it: looking for a sign of life, {DEAD_SECONDS:g} s at most")
    began = time.monotonic()
    while time.monotonic() - began < DEAD_SECONDS:
        time.sleep(_LOOK_SECONDS)
        now = _read(location)
        if not now:
            return
        if now != found:
            raise Held(
                f"{job}: {who} is at work on this, in {location.parent}. Let it finish, or stop it and give the same "
                f"command again: {DEAD_SECONDS:g} s after its last sign of life this one takes over"
            )
    say(f"{job}: {who} gave no sign of life for {DEAD_SECONDS:g} s: taking over")


def _beat(location: Location, staging: Location, mine: dict[str, Any], done: threading.Event) -> None:
    """Signs of life, until the work is done, or the lease is another's or gone with the finished work."""
    beats = 0
    while not done.wait(BEAT_SECONDS):
        beats += 1
        with suppress(OSError):  # of storage; the next sign may come through
            if _holder(_read(location)) != mine["holder"]:
                return
            _write(location, staging, mine, beats)


def _write(location: Location, staging: Location, mine: dict[str, Any], beats: int) -> None:
    location.write(json.dumps({**mine, "beats": beats}).encode(), staging)


def _read(location: Location) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(location.read())
        return found
    except (FileNotFoundError, ValueError):
        return {}


def _holder(lease: dict[str, Any]) -> Any:
    return lease.get("holder")


def _is_gone(lease: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is no more. Of other machines nothing is known."""
    if lease.get("machine") != _machine():
        return False
    try:
        os.kill(int(lease["process"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _machine() -> list[str]:
    """What tells apart the places where a process number means something: host, boot and container."""
    found = [platform.node()]
    with suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(str(Path("/proc/self/ns/pid").readlink()))
    return found
