"""Encoder comparison: several encoders under the same evaluators, as a table, CSV and chart."""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssl_vit.commands import finetuning as finetune
from ssl_vit.commands.cli import show_table
from ssl_vit.commands.compare_options import CompareConfig, named
from ssl_vit.commands.comparing import measure, run_options
from ssl_vit.common.distributed import rank_and_world
from ssl_vit.common.duration import duration
from ssl_vit.common.errors import UserError, check
from ssl_vit.common.files import write_atomically, write_text_atomically
from ssl_vit.evaluators.score import Score
from ssl_vit.pictures.chart import Bars, bars

log = logging.getLogger("ssl_vit")


@dataclass(frozen=True)
class Cell:
    """Cell of the table: score of one encoder by one evaluator, its card and its time."""

    score: Score
    card: dict[str, Any]
    seconds: float


CompareTable = dict[str, dict[str, Cell]]


def fill(config: CompareConfig) -> CompareTable:
    """Table of all encoders and evaluators, measured row by row."""
    table: CompareTable = {}
    for name, encoder in named(config.encoders).items():
        row: dict[str, Cell] = {}
        plain = "".join(c if c.isalnum() else "-" for c in name)
        for evaluator in config.evaluators:
            started = time.perf_counter()
            result = measure(
                config, encoder, evaluator, Path(config.out).expanduser() / f"{evaluator}-{plain}"
            )
            if result is not None:
                seconds = time.perf_counter() - started
                cell = row[evaluator] = Cell(result[0][0], result[1], seconds)
                log.info("%s, %s: %s in %s", name, evaluator, shown(cell), duration(seconds))
        table[name] = row
    return table


def shown(cell: Cell | None) -> str:
    """Cell text: score with half the width of its 95% interval."""
    if cell is None:
        return "-"
    low, high = cell.score.interval
    return f"{cell.score.value:.1f} ±{(high - low) / 2:.1f}"


def write(config: CompareConfig, table: CompareTable) -> list[Path]:
    """Write the table as CSV and PNG and all cards as JSON, each atomically; returns the paths."""
    out = Path(config.out).expanduser()
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        ("encoder", "evaluator", "features", "setting", "metric", "value", "low", "high", "seconds")
    )
    cards: dict[str, dict[str, Any]] = {}
    for name, row in table.items():
        for evaluator, cell in row.items():
            score, (low, high) = cell.score, cell.score.interval
            metric, value = next(iter(score.metrics.items()))
            cards.setdefault(name, {})[evaluator] = cell.card | {"scores": [asdict(score)]}
            ends = (f"{value:.3f}", f"{low:.3f}", f"{high:.3f}", f"{cell.seconds:.0f}")
            rows.writerow((name, evaluator, score.features, score.setting, metric, *ends))
    write_text_atomically(out / "compare.csv", text.getvalue())
    write_text_atomically(out / "compare.json", json.dumps(cards, indent=1) + "\n")
    values: Bars = {}
    for name, row in table.items():
        for evaluator, cell in row.items():
            low, high = cell.score.interval
            value = cell.score.value
            values.setdefault(name, {})[evaluator] = (value, low, high)
    first = (next(iter(cell.score.metrics)) for row in table.values() for cell in row.values())
    title = f"{', '.join(dict.fromkeys(first))} in %"
    write_atomically(out / "compare.png", lambda path: bars(path, values, title))
    return [out / name for name in ("compare.csv", "compare.png", "compare.json")]


def compare(config: CompareConfig) -> int:
    """``evaluate compare``; returns the exit status."""
    encoders = named(config.encoders)
    out = Path(config.out).expanduser()
    if out.is_file():
        raise UserError(f"--out is {config.out!r}, a file; give a folder")
    if "finetune" in config.evaluators:  # checks the recipe before the other evaluators run
        first = next((e for e in encoders.values() if not e.startswith("pixels:")), None)
        check(first is not None, "--encoders has raw pixels only, which cannot be fine-tuned")
        assert first is not None
        finetune.parse_options(run_options(config, first, Path(config.out), "tune"))
    out.mkdir(parents=True, exist_ok=True)  # fails before the work, if at all
    if "depth" in config.evaluators:
        log.info(
            "depth: maps are read by --scale 1, of which delta1, in the table, is independent; the "
            "cards have the RMSE in the maps' own unit, as millimetres"
        )
    table = fill(config)
    if rank_and_world()[0]:
        return 0
    rows = [
        (name, *(shown(row.get(evaluator)) for evaluator in config.evaluators))
        for name, row in table.items()
    ]
    title = f"{config.data.val}: in %, ± half of the 95% interval"
    cards = [cell.card["val"] for row in table.values() for cell in row.values()]
    if leaked := max((card.get("groups_in_training", 0) for card in cards), default=0):
        title += f"; {leaked:,} OF ITS GROUPS ARE IN TRAINING, TOO"
    if same := max((card.get("identical_in_training", 0) for card in cards), default=0):
        title += f"; {same:,} OF ITS IMAGES ARE IN TRAINING, TOO"
    metrics = {
        name: next(iter(cell.score.metrics)) for row in table.values() for name, cell in row.items()
    }
    names = [f"{name}: {metrics[name]}" if name in metrics else name for name in config.evaluators]
    show_table(title, rows, header=("encoder", *names))
    for path in write(config, table):
        print(path)
    return 0
