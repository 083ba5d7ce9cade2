"""Lines in a log, a bar in a terminal, and the command that comes next."""

import io
from contextlib import redirect_stdout, suppress

from pipeline import progress
from pipeline.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_with_rate_and_time_left_and_no_bar(capsys, monkeypatch):
    now = iter([0.0, 1.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr("pipeline.progress.time.monotonic", lambda: next(now))
    with Progress("top9", parts=4, samples=40) as parts:
        for _ in range(4):
            parts.advance(10)
    assert capsys.readouterr().out.splitlines() == [
        "top9: 2/4 parts, 3.3 images/s, 00:06 left",
        "top9: 4/4 parts, 5.0 images/s, 00:00 left",
    ]


def test_a_terminal_gets_a_bar_and_lines_above_it():
    with redirect_stdout(Terminal()) as terminal, Progress("top9", parts=4, samples=40) as parts:
        parts.advance(10)
        progress.say("top9: a line")
        for _ in range(3):
            parts.advance(10)
    assert "top9: 100%" in terminal.getvalue()
    assert "40/40" in terminal.getvalue()
    assert "top9: a line\n" in terminal.getvalue()
    assert "4/4 parts" not in terminal.getvalue()


def test_a_bar_is_closed_when_a_part_fails():
    with redirect_stdout(Terminal()) as terminal:
        with suppress(ValueError), Progress("top9", parts=4, samples=40) as parts:
            parts.advance(10)
            raise ValueError("a part failed")
        assert terminal.getvalue().endswith("\n")


def test_the_last_suggestion_is_said_with_its_options_quoted(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_suggested", [])
    progress.say_suggestion()
    assert capsys.readouterr().out == ""
    progress.suggest("deconv.py --run {run} --data {data}", run="runs/a", data="shards/a")
    progress.suggest("deconv.py --data {data} --run {run}", "an index", run="runs/a", data="shards/a")
    progress.say_suggestion()
    assert capsys.readouterr().out == "next: python jobs/deconv.py --data shards/a --index 'an index' --run runs/a\n"
    progress.suggest("atlas.py --run {run}", "an index", run="my runs/a", data="shards/a")
    progress.say_suggestion()
    assert capsys.readouterr().out == "next: python jobs/atlas.py --run 'my runs/a'\n"
