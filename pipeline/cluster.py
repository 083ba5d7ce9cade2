"""The seam to Ray: connecting, what a job asks of the cluster, and the only `map_batches` call of the project."""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.data
from ray.data.block import BlockAccessor

from pipeline import interrupt
from pipeline.progress import say

S = TypeVar("S")
T = TypeVar("T")
W = TypeVar("W")

OBJECT_STORE_BYTES = 512 * 2**20
"""Of a cluster that a job starts for itself: account rows pass through it, and what a fold's groups become."""

PARTS_AT_ONCE = 2
"""Of one actor: while the last batches of a part are waited for and its rows committed, the next one begins."""

MOST_BLOCKS = 2000
"""Into which Ray Data cuts the list of parts: each costs the driver time and memory. One goes to an actor."""

TASKS_AT_ONCE = 16
"""At most, and two for each CPU of the cluster: results of tasks that are under way or wait for the driver. Its memory
and the object store hold no more."""

_AHEAD = 4
"""Calls for each thread that are under way, or wait for a thread or for who asked for them."""

_MARK = 0.001
"""How much an actor asks of a resource that only marks nodes: a thousand actors find room on each of them."""

_LEAST_SHARE = 1e-4
"""Of a GPU: Ray counts in ten-thousandths."""

_COUNTED = ("CPU", "GPU", "memory", "object_store_memory")
"""Ray's own resources, which every node may have; Ray takes them under other names."""

_LAST_PORT = 65535

_HEAD_LOOK_SECONDS = 5.0
_HEAD_LOOKS = 3
"""Without an answer, before the job says that the cluster is gone."""

_ROOM_LOOK_SECONDS = 5.0
"""Between two looks whether nodes live that can hold workers."""

ELASTIC_SECONDS = 15.0
"""Between two looks for room for more training workers; also how long a group whose nodes are gone is waited for."""


class CannotSchedule(ValueError):
    """The cluster can never give what was asked; the message names both."""


class TrainingFailed(RuntimeError):
    """Training failed for good; the message holds what the workers said."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What a job asks of the cluster. It never changes a result."""

    num: int | None = None
    """Workers; default one for each GPU of the cluster, or where there is none, one for each node. 0: no Ray."""
    cpus: int | None = None
    """CPU cores of an actor; default its share of the smallest node."""
    gpus: float | None = None
    """GPUs of an actor; with 0.5, two actors share a GPU; default 1 where the cluster has GPUs, else 0."""
    on: str | None = None
    """Only nodes that have this Ray resource: accelerator_type:A10G, or one that cluster.yaml gives them."""

    def __post_init__(self) -> None:
        for name, least in (("num", 0), ("cpus", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise CannotSchedule(f"--workers.{name} is {value}: give at least {least}")
        if self.gpus is not None:
            _require_gpus(self.gpus)
        if self.on is not None:
            _require_mark("--workers.on", self.on)


@dataclass(frozen=True, kw_only=True)
class Decoders:
    """Actors that only read and decode, on nodes without GPUs, for workers that would wait for images. They never
    change a result."""

    num: int = 0
    """How many; 0: every worker decodes for itself."""
    cpus: int = 1
    """CPU cores of each."""
    on: str = "decoding"
    """The Ray resource that marks the nodes for them; no node that a worker fits on may have it."""

    def __post_init__(self) -> None:
        for name, least in (("num", 0), ("cpus", 1)):
            if getattr(self, name) < least:
                raise CannotSchedule(f"--decoders.{name} is {getattr(self, name)}: give at least {least}")
        _require_mark("--decoders.on", self.on)


def _require_gpus(gpus: float) -> None:
    """Raises: CannotSchedule for what is no share that Ray knows, and no number of GPUs."""
    if not 0 <= gpus < math.inf:
        raise CannotSchedule(f"--workers.gpus is {gpus:g}: give 0 or more")
    if gpus > 1 and gpus % 1:
        raise CannotSchedule(f"--workers.gpus is {gpus:g}: give a whole number, or a share below 1")
    if 0 < gpus < _LEAST_SHARE:
        raise CannotSchedule(f"--workers.gpus is {gpus:g}: give 0, or a share of at least {_LEAST_SHARE:g}")


def _require_mark(option: str, on: str) -> None:
    """Raises: CannotSchedule where it is no resource, or one of which Ray counts what each node has."""
    if not on.strip() or on in _COUNTED:
        raise CannotSchedule(
            f"{option} is {on!r}: give a resource that marks some nodes, as accelerator_type:A10G or one that "
            "cluster.yaml gives them; how many CPUs and GPUs each actor gets is said by --workers.cpus, --workers.gpus "
            "and --decoders.cpus"
        )


@dataclass(frozen=True)
class Resources:
    """What each of `num` actors gets."""

    num: int
    cpus: int
    gpus: float
    on: str | None = None

    @property
    def marks(self) -> dict[str, float]:
        """Of each Ray resource that marks its nodes, how much it asks for."""
        return {} if self.on is None else {self.on: _MARK}

    def asked(self) -> str:
        """What each asks for, in words."""
        marked = f" and the resource {self.on!r}" if self.on else ""
        return f"{self.cpus} CPUs and {self.gpus:g} GPUs{marked}"

    def room(self, node: dict[str, float]) -> int:
        """How many of them a node holds."""
        if self.on is not None and not node.get(self.on):
            return 0
        on_cpus = int(node.get("CPU", 0) // self.cpus)
        return min(on_cpus, _on_gpus(node, self.gpus)) if self.gpus else on_cpus


@dataclass(frozen=True)
class Stage:
    """Actors that every part goes through."""

    actor: type
    arguments: dict[str, Any]
    resources: Resources


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A connection to Ray, closed at the end unless it was there before.

    Under `ray job submit`, or with an address, the job joins that cluster; otherwise it starts one of its own. Its
    own is never the one that some earlier process left behind: `address="local"`.
    """
    if ray.is_initialized():
        yield
        return
    # Ray warns on stderr of every actor whose arguments lie in the object store; ours are plain data in the driver.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        with interrupt.kept():
            _connect(address)
    except ConnectionError as error:
        raise CannotSchedule(
            f"no Ray cluster answers at {address!r}: {error}; start one or leave --address out"
        ) from None
    try:
        with nullcontext() if address is None else _watched(ray.get_runtime_context().gcs_address):
            yield
    finally:
        with interrupt.kept():
            ray.shutdown()


def _connect(address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        _require_answer(address)
        ray.init(address=address, runtime_env=_runtime_env(), **quiet)
    elif os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        ray.init(**quiet)
    else:
        # Loopback only, no dashboard: a laptop's job opens no port to others.
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            runtime_env=_runtime_env(),
            **quiet,
        )


@contextmanager
def _looking(seconds: float, look: Callable[[], None]) -> Iterator[None]:
    """Call `look` every so many seconds, in a thread beside the block."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(seconds):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(seconds)  # longer only while it waits for a head that is gone


@contextmanager
def _watched(head: str) -> Iterator[None]:
    """Say so when the head of the cluster answers no more: Ray ends the process after a minute, without a word."""
    silent = 0

    def look() -> None:
        nonlocal silent
        silent = 0 if _answers(head) else silent + 1
        if silent == _HEAD_LOOKS:
            say(
                f"the head of the Ray cluster at {head} does not answer any more: unless it does soon, Ray ends "
                "this job within a minute. What is done is kept: start a cluster and give the same command again"
            )

    with _looking(_HEAD_LOOK_SECONDS, look):
        yield


@contextmanager
def _room_watched(*needed: Resources, least: int = 1) -> Iterator[None]:
    """Say so when the living nodes have no room any more for `least` workers of each kind, and when they have again.

    Ray waits for a node for ever, without a word.
    """
    waiting = False

    def look() -> None:
        nonlocal waiting
        try:
            found = nodes()
        except Exception:  # the head is gone, and _watched says so
            return
        rooms = [(sum(resources.room(node) for node in found), resources) for resources in needed]
        short = [(room, resources) for room, resources in rooms if room < least]
        if short and not waiting:
            room, resources = short[0]
            who = f"the living nodes can hold {room} of {least} workers" if room else "no living node can hold a worker"
            say(
                f"{who} any more: each needs {resources.asked()}; {_describe(found)}. What is done is kept, and this "
                "job waits: it goes on when such a node comes. To stop it: Ctrl-C, and the same command later"
            )
        elif waiting and not short:
            say("there is room for the workers again: this job goes on")
        waiting = bool(short)

    with _looking(_ROOM_LOOK_SECONDS, look):
        yield


def _answers(head: str) -> bool:
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_HEAD_LOOK_SECONDS).close()
    except OSError:
        return False
    return True


def _runtime_env() -> dict[str, Any]:
    """Workers import what the driver imports, installed or not, whatever folder they were started in."""
    root = str(Path(__file__).resolve().parents[1])
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}}


def _require_answer(address: str) -> None:
    """Ray itself would go on asking for minutes. Raises: CannotSchedule."""
    if address in ("auto", "local"):
        return
    match = re.fullmatch(r"(?:ray://)?\[?([^\]/\s]+)\]?:(\d{1,5})", address)
    if match is None or int(match[2]) > _LAST_PORT:
        raise CannotSchedule(
            f"--address is {address!r}: give HOST:PORT of the cluster's head (6379, if it was given no other port; "
            "8265 is the dashboard's, for `ray job submit`), or auto for the cluster of this machine"
        )
    try:
        socket.create_connection((match[1], int(match[2])), timeout=10).close()
    except OSError as error:
        raise CannotSchedule(
            f"no Ray cluster answers at {address!r} ({error}): start one or leave --address out"
        ) from None


def nodes() -> list[dict[str, float]]:
    """The resources of each living node."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def resolve(workers: Workers) -> Resources:
    """What each actor gets on this cluster.

    Raises: CannotSchedule where no node can hold an actor, or all of them never fit at once.
    """
    if workers.num == 0:
        return Resources(0, workers.cpus or os.cpu_count() or 1, 0.0)
    found = nodes()
    gpus_there = sum(node.get("GPU", 0) for node in found)
    gpus = workers.gpus if workers.gpus is not None else float(gpus_there > 0)
    least = Resources(1, 1, gpus, workers.on)
    usable = [node for node in found if least.room(node)]
    if not usable:
        raise CannotSchedule(f"an actor needs at least {least.asked()}; {_describe(found)}")
    share = -(-workers.num // len(usable)) if workers.num else 1
    per_node = [max(share, _on_gpus(node, gpus)) if gpus else share for node in usable]
    cpus = workers.cpus or max(1, int(min(node["CPU"] // n for node, n in zip(usable, per_node, strict=True))))
    resources = Resources(1, cpus, gpus, workers.on)
    room = sum(resources.room(node) for node in usable)
    num = workers.num or max(1, min(room, sum(per_node)))
    if num > room:
        raise CannotSchedule(
            f"{num} workers of {cpus} CPUs and {gpus:g} GPUs each were asked for, {room} fit; {_describe(found)}. Ask "
            "for fewer workers, or fewer CPUs or GPUs for each (--workers.num, --workers.cpus, --workers.gpus)"
        )
    return replace(resources, num=num)


def resolve_decoders(decoders: Decoders, workers: Resources) -> Resources:
    """What each decoder gets, on nodes that workers and decoders cannot take from each other.

    Raises: CannotSchedule where they would not all fit, or could keep a worker from its place.
    """
    resources = Resources(decoders.num, decoders.cpus, 0.0, decoders.on)
    found = nodes()
    marked = [node for node in found if node.get(decoders.on)]
    room = sum(resources.room(node) for node in marked)
    if decoders.num > room:
        raise CannotSchedule(
            f"{decoders.num} decoders of {decoders.cpus} CPUs each were asked for, and {room} fit on the {len(marked)} "
            f"nodes with the resource {decoders.on!r} (--decoders.on); {_describe(found)}. Ask for fewer, or give "
            "nodes that resource: see docs/cluster.md"
        )
    if any(workers.room(node) for node in marked):
        raise CannotSchedule(
            f"workers fit on nodes with the resource {decoders.on!r} as well, and could wait for decoders there for "
            "ever: give the workers GPUs, or nodes of their own (--workers.on)"
        )
    return resources


def _on_gpus(node: dict[str, float], gpus: float) -> int:
    """How many actors the GPUs of a node hold; a share of a GPU is always of one GPU."""
    there = int(node.get("GPU", 0))
    return there // int(gpus) if gpus >= 1 else there * int(1 / gpus + 1e-6)


def groups_at_once(resources: Resources) -> int:
    """How many jobs of these workers fit on the cluster at once."""
    return max(1, sum(resources.room(node) for node in nodes()) // resources.num)


def _describe(found: list[dict[str, float]]) -> str:
    nodes_ = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in found)
    return f"the cluster has {len(found)} nodes: {nodes_}"


def fit(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    resources: Resources,
    failures: int,
    most: int | None = None,
) -> None:
    """Run a training function on every worker with Ray Train; a dead worker restarts them all, `failures` times.

    With `most` the number of workers is elastic, from resources.num to `most`: a change restarts them all too.

    Raises: TrainingFailed where it failed for good, with what the workers said.
    """
    if most is not None:  # Ray still counts a node that died, and would wait a minute for it
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(ELASTIC_SECONDS))
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    with tempfile.TemporaryDirectory(prefix="zfnet-ray-train-") as scratch:
        # Ray's own checkpoints are not used; it still wants a place for its state.
        trainer = TorchTrainer(
            worker,
            train_loop_config=config,
            scaling_config=ScalingConfig(
                num_workers=resources.num if most is None else (resources.num, most),
                use_gpu=resources.gpus > 0,
                resources_per_worker={"CPU": resources.cpus, "GPU": resources.gpus, **resources.marks},
                elastic_resize_monitor_interval_s=ELASTIC_SECONDS,
            ),
            run_config=RunConfig(
                name="train", storage_path=scratch, failure_config=FailureConfig(max_failures=failures)
            ),
        )
        # It would take Ctrl-C for itself, and wait for a controller that may be gone. Closing Ray ends the workers too.
        trainer._register_sigint_handler = lambda controller: None
        try:
            with _room_watched(resources, least=resources.num):
                trainer.fit()
        except TrainingFailedError as error:
            raise TrainingFailed(_words(error)) from None


def _words(error: Exception) -> str:
    """What failed on the workers: an error of ours in its own words, any other with the workers' stacks."""
    causes = [getattr(cause, "_base_exc", cause) for cause in getattr(error, "worker_failures", {}).values()]
    ours = [str(cause) for cause in causes if type(cause).__module__.partition(".")[0] in ("pipeline", "zfnet")]
    if ours:
        return ours[0]
    return f"{error}\nThe same command goes on from the last checkpoint; --failures: how many deaths a call makes good"


def train_context() -> tuple[int, int, str]:
    """Rank, number of workers and device of the training worker that asks."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size(), str(ray.train.torch.get_device())


def map_parts(numbers: list[int], *stages: Stage) -> Generator[dict[str, Any], None, None]:
    """Send the parts of these numbers through the stages; yields each row that an actor of the last one returns, as it
    comes.

    Ray Data may run a part more than once (actors are restarted for ever): actors must commit idempotently and
    count their attempts themselves. Closing the iterator ends the actors.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if stages[-1].resources.num == 0:
        (alone,) = stages
        yield from _in_process(alone.actor(**alone.arguments), numbers)
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the job says itself how far it is
    context.print_on_execution_start = False
    blocks = min(len(numbers), MOST_BLOCKS)
    dataset = ray.data.from_items([{"part": number} for number in numbers], override_num_blocks=blocks)
    for stage in stages:
        dataset = _through(dataset, stage, len(numbers))
    # Not iter_rows(): the threads in which it reads ahead outlive an error, and one that asks Ray for something after
    # Ray's end ends the process, before the error is told.
    with _room_watched(*(stage.resources for stage in stages)):
        for bundle in dataset.iter_internal_ref_bundles():
            for block in bundle.blocks:
                yield from BlockAccessor.for_block(ray.get(block.ref)).iter_rows(public_row_format=True)


def _through(dataset: ray.data.Dataset, stage: Stage, parts: int) -> ray.data.Dataset:
    return dataset.map_batches(
        stage.actor,
        fn_constructor_kwargs=stage.arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=min(stage.resources.num, parts),
            max_concurrent_calls_per_actor=PARTS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        num_cpus=stage.resources.cpus,
        num_gpus=stage.resources.gpus or None,
        resources=stage.resources.marks or None,
    )


def in_tasks(do: Callable[[S], T], given: Iterable[S], on: str | None = None) -> Iterator[T]:
    """`map` in Ray tasks of one CPU each, on nodes with the resource `on`: the results in order, as they are asked for.

    Raises: what `do` raises; CannotSchedule where the workers of a task died several times.
    """
    each = Resources(1, 1, 0.0, on)
    task, sent = ray.remote(_do).options(num_cpus=1, resources=each.marks), ray.put(do)
    most = min(TASKS_AT_ONCE, 2 * int(ray.cluster_resources().get("CPU", 1)))
    with _room_watched(each):
        yield from _in_order(lambda one: task.remote(sent, one), _result, given, most)


def in_threads(do: Callable[[S], T], given: Iterable[S], at_once: int) -> Iterator[T]:
    """`map` in threads: the results in order, as they are asked for. However many there are, few are held.

    Raises: what `do` raises.
    """
    threads = ThreadPoolExecutor(at_once)
    try:
        yield from _in_order(lambda one: threads.submit(do, one), Future.result, given, _AHEAD * at_once)
    finally:
        threads.shutdown(cancel_futures=True)


def _in_order(send: Callable[[S], W], result: Callable[[W], T], given: Iterable[S], most: int) -> Iterator[T]:
    """The result of each in order, where `most` are sent before the first one's is waited for."""
    under_way: deque[W] = deque()
    for one in given:
        under_way.append(send(one))
        if len(under_way) == most:
            yield result(under_way.popleft())
    while under_way:
        yield result(under_way.popleft())


def _do(do: Callable[[S], T], one: S) -> T:
    return do(one)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        first = str(error).splitlines()[0]
        raise CannotSchedule(
            f"a task of the fold was lost again and again ({first}): its workers die (out of memory?), or their nodes "
            "go. What is done is kept: give the same command again, with --workers.num 0 to fold in one process"
        ) from None


def _in_process(actor: Any, numbers: list[int]) -> Iterator[Any]:
    """As Ray Data does it, in the order of the parts."""
    calls, most = ThreadPoolExecutor(PARTS_AT_ONCE), _AHEAD * PARTS_AT_ONCE
    try:
        rows = _in_order(lambda number: calls.submit(actor, {"part": [number]}), Future.result, numbers, most)
        for row in rows:
            yield {name: values[0] for name, values in row.items()}
    finally:  # an error or Ctrl-C: what is under way ends within a batch
        actor.close()
        calls.shutdown(cancel_futures=True)
