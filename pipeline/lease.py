"""One process at a time on one piece of work: a file with a heartbeat, on any storage. It saves work, nothing more.

Storage promises neither an atomic creation nor a common clock. So whoever finds a lease watches it: where it changes,
its holder is alive; where it stays as it is for DEAD_SECONDS, the holder is dead and the lease is taken over. Two
processes that begin in the same moment may both hold it: they write the same bytes under the same names, and nothing
breaks. Where they would not, because they may be of different options, each waits its turn, and then looks again at
what is finished.
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

_SETTLE_SECONDS = 1.0
"""Until whoever wrote in the same moment is seen, on storage that lets several do so."""


class Held(RuntimeError):
    """Another process is at work on the same; the message says which."""


@contextmanager
def held(location: Location, staging: Location, job: str, *, in_turn: bool = False) -> Iterator[None]:
    """Hold the lease in the file `location` while the block runs.

    Args:
        staging: a folder on the same storage, for what is being written.
        job: what the messages call the work.
        in_turn: wait for a holder that is alive, and of those who ask in the same moment let one go first.

    Raises: Held where another process shows signs of life, and `in_turn` was not asked for; StorageError.
    """
    mine = {"holder": uuid.uuid4().hex, "host": platform.node(), "process": os.getpid(), "machine": _machine()}
    if in_turn:
        _take_turn(location, staging, job, mine)
    else:
        require_free(location, job)
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


def require_free(location: Location, job: str) -> None:
    """Return once nobody holds the lease. Raises: Held."""
    found = _read(location)
    if not found or _is_gone(found):
        return
    who = _who(found)
    say(f"{job}: {who} is at work on this, or died at it: looking for a sign of life, {DEAD_SECONDS:g} s at most")
    if _shows_life(location, found, job):
        raise Held(
            f"{job}: {who} is at work on this, in {location.parent}. Let it finish, or stop it and give the "
            f"same command again: {DEAD_SECONDS:g} s after its last sign of life this one takes over"
        )


def _take_turn(location: Location, staging: Location, job: str, mine: dict[str, Any]) -> None:
    """Write the lease when nobody holds it; of those who write in the same moment, one has it."""
    said = None
    while True:
        found = _read(location)
        if found and not _is_gone(found):
            if _holder(found) != said:
                say(f"{job}: {_who(found)} is finishing {job}: waiting for it")
                said = _holder(found)
            if _shows_life(location, found, job):
                continue
        left = bool(found) or location.exists()  # by a holder that died, or what is no lease
        if left and _read(location) == found:
            location.delete()
        written = location.write_new(_text(mine, 0), staging)
        if written is False:
            continue
        if written and not left:
            return
        if written is None:
            _write(location, staging, mine, 0)
        time.sleep(_SETTLE_SECONDS)
        if _holder(_read(location)) == mine["holder"]:
            return


def _shows_life(location: Location, found: dict[str, Any], job: str) -> bool:
    """Whether the holder of this lease gives a sign of life before it counts as dead; not where it gives it back."""
    began = time.monotonic()
    while time.monotonic() - began < DEAD_SECONDS:
        time.sleep(_LOOK_SECONDS)
        now = _read(location)
        if not now:
            return False
        if now != found:
            return True
    say(f"{job}: {_who(found)} gave no sign of life for {DEAD_SECONDS:g} s: taking over")
    return False


def _who(lease: dict[str, Any]) -> str:
    return f"process {lease.get('process')} on {lease.get('host')}"


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
    location.write(_text(mine, beats), staging)


def _text(mine: dict[str, Any], beats: int) -> bytes:
    return json.dumps({**mine, "beats": beats}).encode()


def _read(location: Location) -> dict[str, Any]:
    """The lease; empty where there is none, or what is there is none."""
    try:
        found = json.loads(location.read())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("process"), int) else {}


def _holder(lease: dict[str, Any]) -> Any:
    return lease.get("holder")


def _is_gone(lease: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is no more. Of other machines nothing is known."""
    if lease.get("machine") != _machine():
        return False
    try:
        os.kill(lease["process"], 0)
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
