"""Which job makes a table, and the command that a user gives for it."""

from __future__ import annotations

import shlex

SHARDS = "SHARDS"
"""Stands in a command for the folder of the images' shards: a run knows its images by identity, not where they lie."""

_OTHERWISE_CALLED = {
    "metrics": "train",
    "samples": "shards",
    "feature_maps": "top9",
    "maxima": "top9",
    "predictions": "evaluate",
    "confusion": "evaluate",
    "class_errors": "evaluate",
    "evaluation": "evaluate",
    "evolution_cells": "evolution",
    "evolution_convergence": "evolution",
    "correspondence_pairs": "correspondence",
    "correspondence_images": "correspondence",
    "localization": "localize",
    "localization_images": "localize",
    "localization_windows": "localize",
    "detection": "detect",
    "detection_objects": "detect",
    "detection_windows": "detect",
    "detection_curves": "detect",
    "detection_classes": "detect",
    "units_comparison": "units",
}
"""The job of a table that does not have its name."""

_WITHOUT_IMAGES = {
    *("groups", "duplicates", "units", "transfer", "transfer_duplicates", "multilabel", "retrieval"),
    *("atlas", "figures"),
}
"""Jobs that read a run's tables alone."""


def job(table: str) -> str:
    """The name of the job that makes a table: TABLE, or TABLE-NAME."""
    kind = table.partition("-")[0]
    return _OTHERWISE_CALLED.get(kind, kind)


def command(table: str, run: str, options: str = "") -> str:
    """What makes a table of a run: TABLE, TABLE-NAME; or what atlas and figures show of its tables.

    Args:
        table: its name, or that of a job without tables.
        run: run directory.
        options: further ones of the job, ready for a shell.
    """
    made_by, (_, _, name) = job(table), table.partition("-")
    parts = [f"python jobs/{made_by}.py --run {shlex.quote(run)}"]
    parts += [f"--data {SHARDS}"] if made_by not in _WITHOUT_IMAGES else []
    parts += [options] if options else []
    parts += [f"--name {shlex.quote(name)}"] if name else []
    return " ".join(parts)
