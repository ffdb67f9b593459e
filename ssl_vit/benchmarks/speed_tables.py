"""Benchmark tables: a benchmark report as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ssl_vit.benchmarks.measured import machine


class TableOf(NamedTuple):
    """Table: title, header and rows; the first column names the rows."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def loader_tables(report: dict[str, Any]) -> Iterator[TableOf]:
    """Loader tables: images per second of each side, and ratios of ours to each peer's."""
    rows: list[tuple[str, ...]] = []
    for name, found in report["results"].items():
        rows.append((name, *_rate(found)))
    for name, ratio in report["ratios"].items():
        rows.append((name, _times(ratio), ""))
    yield TableOf(_title(report), ("", "images/s", "range"), rows)


def step_tables(report: dict[str, Any]) -> Iterator[TableOf]:
    """Step tables: speed, FLOPs, share of the peak and memory of each side; our step breakdown."""
    header = ("", "images/s", "range", "ours is", "GFLOP/img", "of peak")
    rows: list[tuple[str, ...]] = []
    for name, found in report["results"].items():
        cost = f"{found['flops_per_image'] / 1e9:.3g}"
        share, memory = _share(found["share_of_peak"]), gigabytes(found["peak_memory_bytes"])
        faster, larger = _ours(report["ratios"], name), _ours(report["memory_ratios"], name)
        rows.append((name, *_rate(found), faster, cost, share, memory, larger))
    title = f"{_title(report)}\n{_peak(report['matmul_peak'])}"
    yield TableOf(title, (*header, "memory", "ours is"), rows)
    yield _parts(report["breakdown"], "breakdown of our step, photometric operations included")
    if "baseline" in report:
        yield _changes(report)


def end_to_end_tables(report: dict[str, Any]) -> Iterator[TableOf]:
    """End-to-end tables: speed of each side, of its loader and step alone; our step breakdown."""
    header = (
        "",
        "images/s",
        "range",
        "ours is",
        "s/step",
        "waiting",
        "loader",
        "step",
        "bound by",
    )
    rows: list[tuple[str, ...]] = []
    for name, found in report["results"].items():
        alone = (found["loader_images_per_second"], found["step_images_per_second"])
        row = (f"{found['seconds_of_a_step']:.3g}", _share(found["share_waiting_for_images"]))
        faster = _ours(report["ratios"], name)
        rows.append((name, *_rate(found), faster, *row, *map(_number, alone), found["bound"]))
    workers = f"{report['sizes']['workers']} workers; loader, step: images/s of each alone"
    yield TableOf(f"{_title(report)}\n{workers}", header, rows)
    yield _parts(report["breakdown"], "breakdown of our step")


def detection_tables(report: dict[str, Any]) -> Iterator[TableOf]:
    """Detection table: speed and memory of each network's step at each image size."""
    rows: list[tuple[str, ...]] = []
    for found in report["results"]:
        name, memory = f"{found['size']} px, {found['network']}", found["peak_memory_bytes"]
        rows.append((name, *_rate(found), gigabytes(memory)))
    options, where = report["options"], machine(report["hardware"])
    title = f"detection: images with {options['objects']} objects and masks, batches of "
    title += f"{options['batch_size']}\n{report['precision']}, {where}"
    yield TableOf(title, ("", "images/s", "range", "memory"), rows)


def _changes(report: dict[str, Any]) -> TableOf:
    """Table of what has changed since an earlier report, and what else differs."""
    before, rows = report["baseline"], list[tuple[str, ...]]()
    for name, found in before["results"].items():
        old, new = found["images_per_second"], report["results"][name]["images_per_second"]
        rates = (_number(old), _number(new), _times(found["ratio"]))
        chance = "within the repeats" if found["within_repeats"] else ""
        rows.append((name, *rates, chance, _times(found["memory_ratio"])))
    for name, (old, new) in before["differs"].items():
        rows.append((name, str(old), str(new), "", "", ""))
    title = f"now and on {before['date']}, on the same machine"
    return TableOf(title, ("", "before", "now", "images/s", "", "memory"), rows)


def _title(report: dict[str, Any]) -> str:
    sizes, where = report["sizes"], machine(report["hardware"])
    crops = " + ".join(f"{c['count']} of {'x'.join(map(str, c['size']))}" for c in sizes["crops"])
    title = f"{report['benchmark']} {report['method']}: {crops} px, "
    title += f"batches of {sizes['batch_size']}\n"
    return title + f"{report.get('precision', 'uint8 to float32')}, {where}"


def _peak(peak: dict[str, Any]) -> str:
    if peak["flops_per_second"] is None:
        return "peak: not measured, the step has no matrix product"
    m, k, n = peak["shape"]
    rate = f"{peak['flops_per_second'] / 1e12:.3g} TFLOP/s"
    return f"peak: {rate}, the step's fastest linear layer, ({m}, {k}) x ({k}, {n})"


def _parts(breakdown: dict[str, Any], title: str) -> TableOf:
    rows: list[tuple[str, ...]] = []
    for name, part in breakdown["parts"].items():
        rows.append((name, f"{part['seconds']:.4f}", _share(part["share"])))
    rows.append(("sum", f"{breakdown['seconds']:.4f}", ""))
    return TableOf(title, ("", "seconds", "share"), rows)


def _rate(found: dict[str, Any]) -> tuple[str, str]:
    rates = found["images_per_second_of_repeats"]
    return _number(found["images_per_second"]), f"{_number(min(rates))}-{_number(max(rates))}"


def _number(rate: float) -> str:
    return f"{rate:,.{2 if rate < 10 else 1 if rate < 100 else 0}f}"


def _ours(ratios: dict[str, float | None], name: str) -> str:
    """Ratio of ours to this side; empty for ours itself."""
    key = f"ours / {name}"
    return _times(ratios[key]) if key in ratios else ""


def _times(ratio: float | None) -> str:
    return "?" if ratio is None else f"{ratio:.2f} x"


def _share(share: float | None) -> str:
    return "?" if share is None else f"{share:.1%}"


def gigabytes(count: int | None, digits: int = 2) -> str:
    """Bytes as text; ``?`` where they are not known."""
    return "?" if count is None else f"{count / 2**30:.{digits}f} GiB"


def markdown_rows(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table of Markdown; the second one parts the header from the rest."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
