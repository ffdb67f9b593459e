"""Baseline of the step benchmark: an earlier report of the same machine, and what has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssl_vit.common.errors import UserError, check
from ssl_vit.common.layers import flatten

Report = dict[str, Any]
# What makes a machine, of what a report says of its hardware.
_MACHINE = ("cpu", "cores", "threads", "device", "gpu")
# Options that say how often and with what it is measured, not what is.
_OF_THE_CALL = ("against", "baseline", "config", "dry_run", "out", "repeats", "warm_up")


def read_baseline(path: str, method: str) -> Report:
    """Report of an earlier ``benchmark step`` of a method.

    Raises:
        UserError: it cannot be read, or is of something else.
    """
    about = f"--baseline is {path!r}"
    try:
        report = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{about}, which cannot be read: {error}") from None
    whole = isinstance(report, dict) and report.get("benchmark") == "step"
    whole = whole and all(isinstance(report.get(k), dict) for k in ("hardware", "sizes", "results"))
    whole = whole and all(_is_side(side) for side in report["results"].values())
    check(whole, f"{about}, which is no report of step; give what --out of an earlier one wrote")
    check(
        report.get("method") == method,
        f"{about}, a report of {report.get('method')!r}, not of {method!r}",
    )
    return dict(report)


def _is_side(side: Any) -> bool:
    """True for the result of a side, with a rate."""
    return isinstance(side, dict) and isinstance(side.get("images_per_second"), int | float)


def check_alike(path: str, before: Report, now: Report) -> None:
    """Check, before the work, that two reports may be compared; ``now`` needs no results yet.

    Raises:
        UserError: another machine, number of threads, precision or size; each value is given.
    """
    old, new = _alike(before), _alike(now)
    other = [f"{k} {old.get(k)} (now {new[k]})" for k in new if old.get(k) != new[k]]
    check(
        not other,
        f"--baseline is {path!r}, which was measured with other {', '.join(other)}; only reports "
        "of the same machine, precision and sizes are compared",
    )


def _alike(report: Report) -> dict[str, Any]:
    """Values that two reports must have in common, by name."""
    machine = {name: report["hardware"].get(name) for name in _MACHINE}
    sizes = flatten({"sizes": report["sizes"]})
    return {**machine, "precision": report.get("precision"), **sizes}


def changes(before: Report, now: Report) -> Report:
    """Changes since a report, for JSON: rate and memory of each side that both have, before, and as
    ratios of now to before; and the versions and options that differ.

    ``within_repeats``: whether the repeats of the two overlap, so that the ratio may be chance.
    """
    sides = [name for name in now["results"] if name in before["results"]]
    return {
        "date": before.get("date"),
        "commit": before.get("commit"),
        "differs": _differing(before, now),
        "results": {n: _change(before["results"][n], now["results"][n]) for n in sides},
    }


def _change(before: Report, now: Report) -> Report:
    rates, memory = (
        [side.get(key) for side in (before, now)]
        for key in ("images_per_second", "peak_memory_bytes")
    )
    old, new = (side.get("images_per_second_of_repeats") or [] for side in (before, now))
    apart = bool(old and new) and (max(old) < min(new) or max(new) < min(old))
    return {
        "images_per_second": rates[0],
        "peak_memory_bytes": memory[0],
        "ratio": _ratio(*rates),
        "memory_ratio": _ratio(*memory),
        "within_repeats": not apart,
    }


def _ratio(before: float | int | None, now: float | int | None) -> float | None:
    return now / before if before and now else None


def _differing(before: Report, now: Report) -> dict[str, list[Any]]:
    """Versions, commit, options and the rest of the hardware, where they are not the same, by
    name: before and now."""
    old, new = (_named(report) for report in (before, now))
    return {name: [old.get(name), new[name]] for name in new if old.get(name) != new[name]}


def _named(report: Report) -> dict[str, Any]:
    options = flatten(report.get("options") or {})
    found = {name: value for name, value in options.items() if name not in _OF_THE_CALL}
    rest = {k: v for k, v in report["hardware"].items() if k not in _MACHINE}
    return {"commit": report.get("commit"), **(report.get("versions") or {}), **rest, **found}
