"""Proof on a device: checks that only a GPU can make, each part a process, what matters most first.

A part is a file of tests or a benchmark by its own door. One that fails, takes too long, or has no
time left, stops none of the others, and keeps what it has measured.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ssl_vit.benchmarks.speed_tables import TableOf, gigabytes, markdown_rows

# Seconds between two requests to end, each harder than the last, to a part that is out of time.
_GRACE = 5.0
# How a test may end, but for passing, in a report of pytest.
_ENDS = ("failure", "error", "skipped")
# Beginning of a line of output that is a measurement.
MEASURED = "=> "
# Last lines of a failed part's output that are kept.
_KEPT = 20
# Parts that run: each leads a group of processes, which Ctrl-C does not reach.
_running: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Part:
    """One question to the device, asked in a process of its own.

    Attributes:
        name: in the report.
        asks: what it finds out, in some words.
        arguments: of Python; ``{out}`` is the file for its findings.
        least: seconds without which it is not begun.
        most: seconds after which it is ended, so that others have time.
        needs: modules that it imports; without one it is left out.
        files: without these it is left out, too.
        otherwise: arguments to try if it fails; none: that is all.
        beside: it needs no device, and runs while others do.
    """

    name: str
    asks: str
    arguments: tuple[str, ...]
    least: float = 20.0
    most: float = math.inf
    needs: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    otherwise: tuple[str, ...] = ()
    beside: bool = False

    @property
    def missing(self) -> str:
        """Requirements that are not met here; empty if all are."""
        lacks = [f"{name} is not installed" for name in self.needs if find_spec(name) is None]
        lacks += [f"{path.name} is only in a checkout" for path in self.files if not path.exists()]
        return ", ".join(lacks)


@dataclass
class Outcome:
    """Outcome of a part.

    Attributes:
        state: ``passed``, ``failed``, ``out of time``, ``not begun`` or ``left out``.
        seconds: that it took.
        said: its measurements in words, the reasons of failures, or why it was not run.
        found: its report, if it writes one.
    """

    state: str
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)


def carry_out(part: Part, seconds: float, device: str) -> Outcome:
    """Run a part for at most so many seconds; if it fails, what it has instead.

    A part that needs no device is given none.
    """
    if part.missing:
        return Outcome("left out", said=[part.missing])
    if seconds < part.least:
        left = max(0.0, seconds)
        return Outcome("not begun", said=[f"{left:.0f} s are left; {part.least:.0f} are needed"])
    began, device = time.perf_counter(), "cpu" if part.beside else device
    outcome = _run(part.arguments, min(seconds, part.most), device)
    left = seconds - (time.perf_counter() - began)
    if outcome.state != "failed" or not part.otherwise or left < part.least:
        return outcome
    again = _run(part.otherwise, min(left, part.most), device)
    why = outcome.said[-1] if outcome.said else "no word"
    again.said.insert(0, f"failed at first ({why}), then run as: {' '.join(part.otherwise)}")
    return replace(again, seconds=round(outcome.seconds + again.seconds, 1))


def _run(arguments: Sequence[str], seconds: float, device: str) -> Outcome:
    """Run Python with these arguments for at most so many seconds."""
    with tempfile.TemporaryDirectory(prefix="ssl_vit-") as scratch:
        out, output = Path(scratch) / "found.json", Path(scratch) / "output"
        command = [sys.executable, *(a.replace("{out}", str(out)) for a in arguments)]
        started = time.perf_counter()
        status = _ended(command, output, seconds, device)
        took = time.perf_counter() - started
        lines = output.read_text(errors="replace").splitlines()
        state = {0: "passed", None: "out of time"}.get(status, "failed")
        outcome = Outcome(state, round(took, 1))
        _read(outcome, out, lines)
    return outcome


def _ended(command: Sequence[str], output: Path, seconds: float, device: str) -> int | None:
    """Status of a command; None: it was ended, with all its children, as its time was over.

    It is interrupted first, upon which pytest writes its report.
    """
    with output.open("wb") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=out, env=_surroundings(device), start_new_session=True
        )
    _running.add(child)
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _running.discard(child)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(child.pid, number)
            with suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE)


def kill_running() -> None:
    """Kill the parts that run in other threads, with all their children."""
    for child in list(_running):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def _surroundings(device: str) -> dict[str, str]:
    """Environment of a part: it sees the one device, which is then its first. Its lines are written
    as they come, so that they are there when it is ended."""
    here = os.environ | {"PYTHONUNBUFFERED": "1"}
    name, _, index = device.partition(":")
    if name == "cpu":
        return here | {"SSL_VIT_REHEARSE": "cpu"}
    if not index:
        return here
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    chosen = seen.split(",")[int(index)] if seen else index
    return here | {"CUDA_VISIBLE_DEVICES": chosen}


def _read(outcome: Outcome, out: Path, lines: list[str]) -> None:
    """Findings of a part: from its report, what it says it has measured, and its last lines if it
    was ended or left no report."""
    text = out.read_text() if out.exists() else ""
    outcome.said = [line.removeprefix(MEASURED) for line in lines if line.startswith(MEASURED)]
    with suppress(ElementTree.ParseError, ValueError):  # one that was ended may have cut its report
        if text.startswith("<"):
            _read_tests(outcome, text)
        elif text:
            outcome.found = json.loads(text)
    if outcome.state == "out of time" or (outcome.state == "failed" and not text):
        last = [line for line in lines if line.strip() and not line.startswith(MEASURED)]
        outcome.said += last[-_KEPT:]


def _read_tests(outcome: Outcome, text: str) -> None:
    """Counts and failures of tests, from pytest's report; the part is left out if all are."""
    cases = list(ElementTree.fromstring(text).iter("testcase"))
    kinds = {k: [c for c in cases if c.find(k) is not None] for k in _ENDS}
    outcome.found = {"tests": len(cases)} | {k: len(found) for k, found in kinds.items()}
    for case in kinds["failure"] + kinds["error"]:
        outcome.said.append(f"{case.get('name')}: {_reason(case)}")
    if outcome.state == "passed" and len(kinds["skipped"]) == len(cases):
        outcome.state = "left out"
        outcome.said += dict.fromkeys(map(_reason, cases))


def _reason(case: ElementTree.Element) -> str:
    """First line of why a test failed or was skipped; of a file that cannot be imported, the last
    line of its error."""
    end = next((e for e in case if e.tag in _ENDS), case)
    first = end.get("message", "").partition("\n")[0]
    errors = [line[1:].strip() for line in (end.text or "").splitlines() if line.startswith("E ")]
    return (errors[-1] if errors and first == "collection failure" else first)[:200]


def steps_table(outcomes: dict[str, Outcome]) -> TableOf:
    """Table of the measured steps: speed, share of peak, memory beside its prediction, peers.

    A step's name begins with that of its recipe.
    """
    header = ("", "images/s", "of peak", "kernels", "device half", "memory", "predicted", "peers")
    rows: list[tuple[str, ...]] = []
    for name, outcome in outcomes.items():
        if "results" not in outcome.found:
            continue
        report, ours = outcome.found, outcome.found["results"]["ours"]
        share, half = ours["share_of_peak"], report["breakdown"]["parts"]["device augmentation"]
        faster = [f"{key.split(' / ')[1]} {r:.2f} x" for key, r in report["ratios"].items() if r]
        rows.append(
            (
                name,
                f"{ours['images_per_second']:,.1f}",
                "?" if share is None else f"{share:.0%}",
                str(report.get("kernels") or "?"),
                f"{half['share']:.1%}",
                gigabytes(ours["peak_memory_bytes"], 1),
                gigabytes(_predicted(name.split()[0], report, outcomes), 1),
                ", ".join(faster) or "-",
            )
        )
    return TableOf("steps in bf16; peers: how many times as many images/s ours makes", header, rows)


def _predicted(recipe: str, report: dict[str, Any], outcomes: dict[str, Outcome]) -> int | None:
    """Bytes that ``scale`` predicts for a recipe's measured step; None: it was not asked, or of the
    whole network only."""
    scale = outcomes.get(f"scale {report['method']}", Outcome("not begun")).found
    row = {row["name"]: row for row in scale.get("recipes", [])}.get(recipe)
    if row is None or report["options"]["encoder"]["depth"]:
        return None
    kept = row["activations"]["kept"]
    images = report["sizes"]["batch_size"]
    return int(row["state"]["1"]["total"] + kept["fixed"] + images * kept["per_image"])


def markdown(table: TableOf, where: str) -> str:
    """The table for a page of the docs, with the device and the date."""
    rows = markdown_rows([table.header, ("---",) * len(table.header), *table.rows])
    return f"{where}: {table.title}\n\n{rows}\n"
