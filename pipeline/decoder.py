"""Ray Data's actor ahead of the sweeps' own, on nodes without GPUs: reads and decodes whole parts (--decoders)."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipeline.actor import PartActor, Pictures, explain
from pipeline.runs import versions
from pipeline.shards import IMAGE_SUFFIXES


class Decoder(PartActor):
    """The first half of a PartActor: its pictures go to one that has the network's device.

    They travel as Ray's own arguments do, pickled from process to process; nothing pickled is ever read from storage.
    """

    def _ready(self) -> None:
        """The actor that computes a part checks the versions of both, and counts its own attempts."""
        self.work = replace(self.work, attempts="decoding")

    def __call__(self, batch: dict[str, Any]) -> Any:
        """One part in, its pictures out; errors are handed on, because Ray would retry them for ever."""
        number = int(batch["part"][0])
        decoded, given_up, error = b"", "", self.error
        if not error:
            try:
                suspect = self.work.was_begun(number)
                with self.turns.take(alone=suspect):
                    given_up = self._why_not(number, suspect) or ""
                    decoded = b"" if given_up else pickle.dumps((versions(), self._decoded(number)), protocol=5)
            except Exception as problem:
                error = explain(problem)
        columns = {"part": [number], "given_up": [given_up], "error": [error]}
        return pa.table({**columns, "decoded": pa.array([decoded], pa.large_binary())})

    def _decoded(self, number: int) -> list[Pictures]:
        """The pictures of each batch of a part, without the files that they were decoded from."""
        found = self.pool.map(self.decode, self.batches(self.work.parts[number]))
        return [([_without_image(picture) for picture in pictures], skipped) for pictures, skipped in found]


def _without_image(picture: Any) -> Any:
    members = {suffix: data for suffix, data in picture.sample.members.items() if suffix not in IMAGE_SUFFIXES}
    return replace(picture, sample=replace(picture.sample, members=members))
