"""The paper's tables as Markdown: a run's numbers, and under them the paper's own, which are of other images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pipeline.figures import paper
from pipeline.figures.source import Missing, Row, Source

Rows = list[list[str]]


def write(source: Source) -> tuple[str, list[str]]:
    """The text, and what is missing of it."""
    text, missing = [], []
    for title, make in TABLES.items():
        try:
            text.append(f"## {title}\n\n{make(source)}")
        except Missing as error:
            missing.append(f"{title}: {error}")
    return "# Tables\n\n" + "\n\n".join(text) + "\n", missing


def _table(header: Sequence[str], rows: Rows) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _both(header: Sequence[str], rows: Rows, paper_header: Sequence[str], paper_rows: Rows) -> str:
    return f"{_table(header, rows)}\n\nThe paper's:\n\n{_table(paper_header, paper_rows)}"


def _correspondence(source: Source) -> str:
    found = source.rows("correspondence", ["layer", "part", "mean", "std_pairs"])
    layers = list(dict.fromkeys(row["layer"] for row in found))
    cells = {(row["part"], row["layer"]): _spread(row["mean"], row["std_pairs"], ".3f") for row in found}
    parts = dict.fromkeys(row["part"] for row in found)
    rows = [[part, *(cells.get((part, layer), "-") for layer in layers)] for part in parts]
    return _both(["hidden part", *layers], rows, ["hidden part", "layer 5", "layer 7"], paper.CORRESPONDENCE)


def _errors(source: Source) -> str:
    found = source.rows("evaluation", ["views", "with_model_ids", "images", "top1_error", "top5_error"])
    rows = [
        [_evaluated(source, row), *(f"{100 * row[f'top{k}_error']:.1f}" for k in (1, 5)), str(row["images"])]
        for row in found
    ]
    header = ["", "top-1 error", "top-5 error", "images"]
    return _both(header, rows, ["ImageNet 2012, validation", "top-1 error", "top-5 error"], paper.IMAGENET)


def _evaluated(source: Source, row: Row) -> str:
    others = len(row["with_model_ids"])
    return f"{source.run.location.name}, {row['views']} views" + (f", with {others} other networks" if others else "")


def _ablation(source: Source) -> str:
    """The table has the paper's numbers itself, where the images are ImageNet's."""
    errors = ["train_top1_error", "top1_error", "top5_error"]
    columns = ["variant", "change", "parameters", *errors, *(f"paper_{name}" for name in errors)]
    rows = [
        [
            f"{row['variant']}: {row['change']}",
            f"{row['parameters']:,}",
            *(f"{100 * row[name]:.1f}" + _printed(row[f"paper_{name}"]) for name in errors),
        ]
        for row in source.rows("ablation", columns)
    ]
    return _table(["network", "parameters", "train top-1", "validation top-1", "validation top-5"], rows)


def _printed(error: float) -> str:
    return "" if math.isnan(error) else f" (paper: {100 * error:.1f})"


def _transfer(source: Source) -> str:
    points = ["images_per_class", "accuracy", "spread"]
    found = source.rows("transfer", ["layer", "classifier", *points])
    if source.run.manifest("scratch"):
        found += source.rows("scratch", ["architecture", *points])
    counts = sorted({row["images_per_class"] for row in found})
    lines: dict[str, dict[int, str]] = {}
    for row in found:
        name = f"{row['classifier']} ({row['layer']})" if "layer" in row else f"from scratch ({row['architecture']})"
        cells = lines.setdefault(name, {})
        cells[row["images_per_class"]] = _spread(100 * row["accuracy"], 100 * row["spread"], ".1f")
    rows = [[name, *(cells.get(count, "-") for count in counts)] for name, cells in lines.items()]
    theirs = [
        _table(["Caltech-101", "15 of each class", "30"], paper.CALTECH101),
        _table(["Caltech-256", "15 of each class", "30", "45", "60"], paper.CALTECH256),
        _table(["by layer", "Caltech-101, 30 of each class", "Caltech-256, 60"], paper.LAYERS),
    ]
    ours = _table(["classifier (layer)", *(f"{count} of each class" for count in counts)], rows)
    return "\n\n".join([ours, "The paper's:", *theirs])


def _multilabel(source: Source) -> str:
    found = source.rows("multilabel", ["layer", "label_name", "average_precision"])
    layers = list(dict.fromkeys(row["layer"] for row in found))
    precision = {(row["label_name"], row["layer"]): row["average_precision"] for row in found}
    names = dict.fromkeys(row["label_name"] for row in found)
    rows = [[name, *(_percent(precision.get((name, layer), math.nan)) for layer in layers)] for name in names]
    rows.append(
        ["mean", *(_percent(_mean([v for (_, of), v in precision.items() if of == layer])) for layer in layers)]
    )
    theirs = ["PASCAL 2012", "Sande et al.", "Yan et al.", "ZFNet"]
    return _both(["class", *layers], rows, theirs, paper.PASCAL)


def _mean(values: Sequence[float]) -> float:
    """Of those that there are."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _percent(share: float) -> str:
    """A dash where there is none."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def _spread(mean: float, spread: float, form: str) -> str:
    """Mean and spread; the mean alone where there is no spread."""
    return f"{mean:{form}}" + ("" if math.isnan(spread) else f" +- {spread:{form}}")


TABLES: dict[str, Callable[[Source], str]] = {
    "Table 1: correspondence, mean feature sign change": _correspondence,
    "Table 2: classification errors, in percent": _errors,
    "Table 3: the network's parts, errors in percent": _ablation,
    "Tables 4, 5 and 7: transfer, accuracy in percent": _transfer,
    "Table 6: several classes an image, average precision in percent": _multilabel,
}
