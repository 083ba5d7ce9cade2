"""Run the pages whose Python blocks show what they print, and write it there: `python docs/generate/cookbook.py`.

A block marked ```python is run; where its last line is an expression, its value is shown in the block ```text that
follows. All blocks of a page share their names. The run that they ask is made here in a minute, the same one each time.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from pipeline import derive, sweep, train  # noqa: E402
from pipeline.analyses import (  # noqa: E402
    deconv,
    duplicates,
    evaluation,
    evolution,
    groups,
    object_occlusion,
    occlusion,
    top9,
    units,
)
from pipeline.cluster import Workers  # noqa: E402
from pipeline.context import Options  # noqa: E402
from pipeline.indexing import index_shards  # noqa: E402
from pipeline.sources.rendered import Rendered  # noqa: E402
from pipeline.sources.writer import write_shards  # noqa: E402

PAGES = [ROOT / "docs" / "cookbook.md"]

RUN, DATA = "runs/demo", "shards/rendered"
"""Where `make` puts its run and shards, in the folder that it is given."""

_BLOCK = re.compile(r"```python\n(?P<source>.*?)```\n(?:\n```text\n(?P<printed>.*?)```\n)?", re.DOTALL)


def make(place: Path) -> None:
    """A small run with the tables that the pages ask: six epochs over 240 images, 120 to look at, and a broken one."""
    alone = Workers(num=0)
    run, data = str(place / RUN), str(place / DATA)
    write_shards(Rendered(train=240, val=120), data)
    add_broken(Path(data))
    train.run(train.Options(run=run, data=data, epochs=6, batch=16, workers=alone))
    options = Options(run=run, data=data, workers=alone)
    sweep.run(evaluation.ANALYSIS, options, evaluation.Config())
    sweep.run(top9.ANALYSIS, options, top9.Config())
    sweep.run(deconv.ANALYSIS, options, deconv.Config(layers=("conv5",)))
    sweep.run(occlusion.ANALYSIS, options, occlusion.Config(first=6))
    sweep.run(object_occlusion.ANALYSIS, options, object_occlusion.Config(per_class=2))
    evolution.run(replace(options, split="train"), evolution.Config(layers=("conv5",)))
    tables_alone = derive.Options(run=run)
    derive.run(groups.ANALYSIS, tables_alone, groups.Config())
    derive.run(duplicates.ANALYSIS, tables_alone, duplicates.Config(correlation=0.8))
    derive.run(units.ANALYSIS, tables_alone, units.Config())


def add_broken(data: Path) -> None:
    """One more shard, with an image whose bytes are none."""
    with tarfile.open(data / "val-000001.tar", "w") as tar:
        for name, content in (("val-broken.jpg", b"not an image"), ("val-broken.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    index_shards([str(data)], str(data), classes=None, accept_damaged=False)


def printed(page: str) -> str:
    """The page with what its blocks print now, in the current folder."""
    names: dict[str, Any] = {}
    out, end = [], 0
    for block in _BLOCK.finditer(page):
        text = _run(block["source"], names)
        out += [page[end : block.start()], f"```python\n{block['source']}```\n"]
        out += [f"\n```text\n{text}\n```\n"] if text else []
        end = block.end()
    return "".join([*out, page[end:]])


def _run(source: str, names: dict[str, Any]) -> str:
    """What a block prints, its last value included, without spaces at the ends of lines."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        exec(compile(tree, "block", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "block", "eval"), names)
            if value is not None:
                print(value)
    return "\n".join(line.rstrip() for line in stream.getvalue().strip("\n").splitlines())


def main() -> None:
    """Make the run and write the pages."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        make(Path(place))
        os.chdir(place)
        for page in PAGES:
            page.write_text(printed(page.read_text()))


if __name__ == "__main__":
    main()
