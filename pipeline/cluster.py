"""The seam to Ray: connecting, what a job asks of the cluster, and the only `map_batches` call of the project."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data

OBJECT_STORE_BYTES = 512 * 2**20
"""Of a cluster that a job starts for itself: only account rows pass through it."""

PARTS_AT_ONCE = 2
"""Of one actor: while the last batches of a part are waited for and its rows committed, the next one begins."""


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
    """GPUs of an actor, fractions allowed; default 1 where the cluster has GPUs, else 0."""

    def __post_init__(self) -> None:
        for name, least in (("num", 0), ("cpus", 1), ("gpus", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise CannotSchedule(f"--workers.{name} is {value}: give at least {least}")


@dataclass(frozen=True)
class Resources:
    """What each of `num` actors gets."""

    num: int
    cpus: int
    gpus: float


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
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
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
    except ConnectionError as error:
        raise CannotSchedule(
            f"no Ray cluster answers at {address!r}: {error}; start one or leave --address out"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _runtime_env() -> dict[str, Any]:
    """Workers import what the driver imports, installed or not, whatever folder they were started in."""
    root = str(Path(__file__).resolve().parents[1])
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}}


def _require_answer(address: str) -> None:
    """Ray itself would go on asking for minutes."""
    match = re.fullmatch(r"(?:\w+://)?\[?([^\]/]+)\]?:(\d+)", address)
    if match is None:
        return  # "auto", or a name that Ray knows
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
    usable = [node for node in found if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= gpus]
    if not usable:
        raise CannotSchedule(f"an actor needs at least 1 CPU and {gpus:g} GPUs; {_describe(found)}")
    share = -(-workers.num // len(usable)) if workers.num else 1
    per_node = [max(share, int(node["GPU"] // gpus)) if gpus else share for node in usable]
    cpus = workers.cpus or max(1, int(min(node["CPU"] // n for node, n in zip(usable, per_node, strict=True))))
    room = sum(
        int(min(node["CPU"] // cpus, node.get("GPU", 0) // gpus if gpus else node["CPU"] // cpus)) for node in usable
    )
    num = workers.num or max(1, min(room, sum(per_node)))
    if num > room:
        raise CannotSchedule(
            f"{num} workers of {cpus} CPUs and {gpus:g} GPUs each were asked for, {room} fit; {_describe(found)}. Ask "
            "for fewer workers, or fewer CPUs or GPUs for each (--workers.num, --workers.cpus, --workers.gpus)"
        )
    return Resources(num, cpus, gpus)


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
                resources_per_worker={"CPU": resources.cpus, "GPU": resources.gpus},
                elastic_resize_monitor_interval_s=ELASTIC_SECONDS,
            ),
            run_config=RunConfig(
                name="train", storage_path=scratch, failure_config=FailureConfig(max_failures=failures)
            ),
        )
        try:
            with _interruptible():
                trainer.fit()
        except TrainingFailedError as error:
            raise TrainingFailed(str(error)) from None


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the block with KeyboardInterrupt: Ray Train takes the signal for itself, and leaves with status 0."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def train_context() -> tuple[int, int, str]:
    """Rank, number of workers and device of the training worker that asks."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size(), str(ray.train.torch.get_device())


def map_parts(
    actor: type, arguments: dict[str, Any], parts: list[dict[str, Any]], resources: Resources
) -> Iterator[Any]:
    """Send every part to an actor; yields each row an actor returns, as it comes.

    Ray Data may run a part more than once (actors are restarted for ever): actors must commit idempotently and
    count their attempts themselves.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if resources.num == 0:
        yield from _in_process(actor(**arguments), parts)
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the job says itself how far it is
    context.print_on_execution_start = False
    dataset = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        actor,
        fn_constructor_kwargs=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=min(resources.num, len(parts)),
            max_concurrent_calls_per_actor=PARTS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
    )
    yield from dataset.iter_rows()


def _in_process(actor: Any, parts: list[dict[str, Any]]) -> Iterator[Any]:
    """As Ray Data does it, in the order of the parts."""
    calls = ThreadPoolExecutor(PARTS_AT_ONCE)
    try:
        for done in calls.map(actor, [{name: [value] for name, value in part.items()} for part in parts]):
            yield {name: values[0] for name, values in done.items()}
    finally:  # an error or Ctrl-C: what is under way ends within a batch
        actor.close()
        calls.shutdown(cancel_futures=True)
