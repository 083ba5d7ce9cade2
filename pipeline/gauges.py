"""Gauges that Prometheus reads from every node of a Ray cluster, ray_zfnet_NAME{run="...", ...}."""

from __future__ import annotations

import ray
from ray.util.metrics import Gauge

SWEEP = {
    "sweep_parts_done": "Parts that this call of the job has done.",
    "sweep_parts_left": "Parts that are still to do.",
    "sweep_images_per_second": "Images a second, all workers together, in the last seconds.",
    "sweep_data_wait_share": "Share of the time that the workers' networks waited for images, in the last seconds.",
    "sweep_skipped": "Samples that this call of the job could not read, by reason.",
}
"""Of a sweep, tagged `run` and `table`, the last one `reason` too."""

_GAUGES: dict[str, Gauge] = {}


def show(values: dict[str, float], meaning: dict[str, str], **tags: str) -> None:
    """Set gauges zfnet_NAME; nothing where Ray does not run.

    Args:
        values: name -> value.
        meaning: name -> what it is, in a sentence.
        tags: what tells one gauge of a name from another.
    """
    if not ray.is_initialized():
        return
    for name, value in values.items():
        if name not in _GAUGES:
            _GAUGES[name] = Gauge(f"zfnet_{name}", description=meaning[name], tag_keys=tuple(tags))
        _GAUGES[name].set(float(value), tags=tags)
