"""What others see of a sweep under way: gauges for Prometheus and, on demand, a line of JSON for each part."""

from __future__ import annotations

import json
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from pipeline import gauges
from pipeline.progress import say
from pipeline.work import Work

_EVERY_SECONDS = 5.0


class Watch:
    """Parts done and left, the rate, how long networks wait, and what was skipped."""

    def __init__(self, work: Work, todo: list[int], *, log_parts: bool) -> None:
        self.work, self.log_parts = work, log_parts
        self.done, self.left = 0, len(todo)
        self.skipped: Counter[str] = Counter()
        self.recent: Counter[str] = Counter()
        self.shown = time.monotonic()
        self._show({"sweep_parts_done": self.done, "sweep_parts_left": self.left})

    def advance(self, row: dict[str, Any]) -> None:
        """A part came back.

        Args:
            row: what PartActor returns: `part`, `samples`, `error`, and its `report` as JSON.
        """
        report = json.loads(row["report"])
        if self.log_parts:
            say(json.dumps(self._line(row, report)))
        if row["error"]:
            return
        self.done, self.left = self.done + 1, self.left - 1
        self.skipped.update(report["skipped"])
        self.recent.update({name: report[name] for name in ("network_seconds", "waited_seconds")})
        self.recent["samples"] += row["samples"]
        self._show({"sweep_parts_done": self.done, "sweep_parts_left": self.left})
        for reason, count in self.skipped.items():
            self._show({"sweep_skipped": count}, reason=reason)
        if self.left == 0 or time.monotonic() - self.shown >= _EVERY_SECONDS:
            self._show_pace()

    def _line(self, row: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
        """What is logged of a part: docs/cluster.md says what each field is."""
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        context = self.work.context
        where = {"run": str(context.run.location), "table": context.table, "work": self.work.location.name}
        done = {"event": "part", "time": when, **where, "part": row["part"], "parts": len(self.work.parts)}
        return {**done, **({"error": row["error"]} if row["error"] else {"samples": row["samples"], **report})}

    def _show_pace(self) -> None:
        """Of what was done since it was last shown."""
        now = time.monotonic()
        rate = self.recent["samples"] / max(now - self.shown, 1e-9)
        waited, network = self.recent["waited_seconds"], self.recent["network_seconds"]
        share = waited / max(waited + network, 1e-9)
        self._show({"sweep_images_per_second": rate, "sweep_data_wait_share": share})
        self.recent.clear()
        self.shown = now

    def _show(self, values: dict[str, float], **tags: str) -> None:
        context = self.work.context
        gauges.show(values, gauges.SWEEP, run=context.run.location.name, table=context.table, **tags)
