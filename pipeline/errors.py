"""The errors that a user can meet: each has a message that says what to do. Any other is a fault of ours."""

from __future__ import annotations

from pipeline.cluster import CannotSchedule, TrainingFailed
from pipeline.runs import RunError
from pipeline.shards import BadShards
from pipeline.storage import StorageError
from zfnet.deconv import Unprojectable
from zfnet.graph import UnknownLayer, Untraceable


class SweepFailed(RuntimeError):
    """A job ended before its table was finished; what is done is kept."""


FORESEEN = (
    BadShards,
    CannotSchedule,
    RunError,
    StorageError,
    SweepFailed,
    TrainingFailed,
    UnknownLayer,
    Unprojectable,
    Untraceable,
)
