"""SIGKILL at a moment drawn from a seed: of an actor, a training worker, a node, the driver, or the head.

Each job is a process of its own, each node real Ray processes of this machine, each file a real file.
"""

import os
import random
import signal
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from pipeline import checkpoints
from pipeline.runs import Run
from tests.jobs import shell

SEED = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10**6)))
GONE_SECONDS = 60.0
"""After a SIGKILL of the driver: until nothing of its own cluster works any more."""

# --------------------------------------------------------------------------------------------------------- processes


def alive(mark: str) -> list[int]:
    """Processes of a job that could still write: they inherit its environment.

    Ray's two agents idle for another minute, telling a head that is gone of its end; they touch nothing.
    """
    found = []
    for pid, name in _processes():
        try:
            ours = mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if ours and b"Agent" not in name:
            found.append(pid)
    return found


def _processes() -> list[tuple[int, bytes]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found.append((int(entry.name), (entry / "cmdline").read_bytes()))
            except OSError:
                continue
    return found


def below(root: int) -> dict[int, bytes]:
    """All processes that come from this one, with what they call themselves."""
    names = dict(_processes())
    parents = {pid: _parent(pid) for pid in names}
    found: dict[int, bytes] = {}
    added = {root}
    while added:
        added = {pid for pid, parent in parents.items() if parent in added and pid not in found}
        found |= {pid: names[pid] for pid in added}
    return found


def _parent(pid: int) -> int:
    return int(_stat(pid)[1])


def _stat(pid: int) -> list[str]:
    """From the state on, as proc(5) has it: state, parent, ..., the time of the start at 19."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["Z", "0", *[""] * 18]


def family(root: int) -> dict[int, str]:
    """All processes that come from this one, and when they began: a number may come again."""
    return {pid: _stat(pid)[19] for pid in below(root)}


def survivors(known: dict[int, str]) -> list[int]:
    """Those of a family that are still there; a dead one whose parent has not looked is not."""
    found = {pid: _stat(pid) for pid in known}
    return [pid for pid, stat in found.items() if stat[0] != "Z" and stat[19] == known[pid]]


def called(pid: int) -> bytes:
    """What a process calls itself; one that is gone does as little as an agent."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b"Agent"


def wait_until_gone(mark: str, within: float = GONE_SECONDS) -> float:
    """Seconds until no process of a job is there any more."""
    began = time.monotonic()
    while alive(mark):
        assert time.monotonic() - began < within, f"processes of a killed job are still there after {within:g} s"
        time.sleep(0.05)
    return time.monotonic() - began


@dataclass(frozen=True)
class Started:
    """A job as a process; what it starts can be told by a mark in the environment."""

    driver: BaseProcess
    mark: str
    log: Path

    def end(self, within: float = 200) -> None:
        """Wait until it has ended well."""
        self.driver.join(within)
        assert self.driver.exitcode == 0, self.log.read_text()

    def require_alive(self) -> None:
        assert self.driver.is_alive(), f"it ended before it could be killed\n{self.log.read_text()}"

    def kill(self) -> None:
        self.require_alive()
        self.driver.kill()
        self.driver.join()


def start(job: str, *arguments: object, log: Path) -> Started:
    mark = uuid.uuid4().hex
    return Started(shell.start(job, *arguments, streams=[log, log], environment={"KILL_TEST": mark}), mark, log)


# ------------------------------------------------------------------------------------------------------------- cluster


class Nodes:
    """A Ray cluster on this machine: a head without CPUs, and two nodes of one CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 2**27}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self.cluster.address
        self.workers = [self.add(), self.add()]

    def add(self):
        """One more node of one CPU."""
        return self.cluster.add_node(num_cpus=1, object_store_memory=2**27)

    def kill(self, victim: str, number: int, worker: bytes) -> None:
        """A node, one that is lost for good, the head, or one of the worker processes of this name."""
        if victim in ("node", "lost"):
            self.kill_node(number)
            if victim == "node":
                self.workers.append(self.add())
        elif victim == "head":
            self.kill_head()
        else:
            self.kill_worker(worker, number)

    def kill_node(self, number: int) -> None:
        """Of one node all processes at once."""
        lost = self.workers.pop(number % 2)
        workers = [pid for pid in below(_raylet(lost)) if pid]
        self.cluster.remove_node(lost, allow_graceful=False)
        for pid in workers:
            _kill(pid)

    def kill_head(self) -> None:
        """The head alone; the nodes find out for themselves, and their workers go on for a while."""
        self.cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        self.cluster.head_node = None

    def kill_worker(self, name: bytes, number: int) -> None:
        """One of the worker processes of this name."""
        found = sorted(pid for node in self.workers for pid, called in below(_raylet(node)).items() if name in called)
        assert found, f"there is no {name!r}"
        _kill(found[number % len(found)])

    def shutdown(self) -> None:
        self.cluster.shutdown()


def _raylet(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------------- moments


@dataclass(frozen=True)
class Moment:
    """When to kill: in one of two stages of a run, so far in it, and so much later."""

    stage: str
    """parts: from the first part (or step) that is committed to the last but two. end: all are; fold and manifests."""
    share: float
    later: float
    """Seconds: a commit takes milliseconds."""
    number: int
    """Which of the actors, workers or nodes."""

    @classmethod
    def drawn(cls, stage: str, *what: object) -> "Moment":
        """The same for the same seed and words."""
        rng = random.Random(f"{SEED} {what}")
        return cls(stage, rng.random(), rng.uniform(0, 0.03), rng.randrange(100))


def kill_at(started: Started, reached: Callable[[], bool], moment: Moment, kill: Callable[[], None]) -> None:
    """Wait for the moment, then kill. The job must not have ended before."""
    while not reached():
        started.require_alive()
        time.sleep(0.002)
    time.sleep(moment.later if moment.stage == "parts" else 0)
    kill()


def committed(run: Path, work: str) -> set[int]:
    """Parts of a sweep."""
    return {int(path.stem[5:]) for path in (run / "unfinished" / work).glob("*/parts/part-*")}


def results(run: Path, tables: tuple[str, ...]) -> set[Path]:
    """Files of finished tables and all that is said of them."""
    places = [run / "results" / kind / table for kind in ("", "manifests") for table in tables]
    beside = [path for kind in ("account", "skipped") for path in (run / "results" / kind).glob(f"{tables[0]}.*")]
    return {path for place in places for path in place.glob("*")} | set(beside)


def step(run: Path) -> int:
    """Of the newest whole checkpoint of a training; 0: there is none."""
    for _ in range(100):
        try:
            found = checkpoints.newest(Run.at(str(run)))
            return checkpoints.step_of(Run.at(str(run)), found) if found else 0
        except FileNotFoundError:  # it was dropped for a newer one while this looked
            continue
    raise AssertionError("no checkpoint stays")
