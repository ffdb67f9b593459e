"""Quality per minute: methods trained for equal time on this machine, judged by one protocol."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ssl_vit.benchmarks.measured import machine, machine_card
from ssl_vit.benchmarks.quality import (
    HEADER,
    JUDGES,
    by_recipe,
    curve,
    fitted_steps,
    markdown,
    minutes_at,
    rate_after,
    table,
)
from ssl_vit.commands.cli import RESUMABLE, show_table
from ssl_vit.commands.compare_options import CompareConfig
from ssl_vit.commands.comparing import measure
from ssl_vit.commands.evaluating import open_sources
from ssl_vit.commands.quality_options import Entry, Plan
from ssl_vit.common.duration import duration
from ssl_vit.common.errors import RunFailed, UserError, check
from ssl_vit.common.files import write_atomically, write_text_atomically
from ssl_vit.evaluators.protocol import write_card
from ssl_vit.evaluators.score import PIXELS
from ssl_vit.pictures.chart import Curve, curves
from ssl_vit.records.run_folder import read_run
from ssl_vit.training.parallel import resolve_device
from ssl_vit.training.run_files import CONFIG_FILE, METRICS_FILE, read_rows
from ssl_vit.weights.exchange import read_info
from ssl_vit.weights.own_files import ENCODER_FILE

log = logging.getLogger("ssl_vit")
# Measurement of a rate: steps that do not count; its share of the budget, and the bounds of that in
# seconds; and the step after which it ends by itself.
_WARM_UP, _SHARE, _LEAST, _MOST, _LAST = 20, 0.05, 2.0, 60.0, 20_000
# Share by which a run may miss its minutes without a warning.
_TOLERANCE = 0.05


class Process:
    """Pretraining by its own door, in a process of its own; leaving the context ends it, saved.

    ``told``: file for what it says; None: standard error.
    """

    def __init__(self, entry: Entry, flags: Sequence[str], told: Path | None = None) -> None:
        door = f"-m ssl_vit.pretrain {entry.method}".split()
        command = [sys.executable, *door, "--config", str(entry.file), *flags]
        with nullcontext(2) if told is None else told.open("wb") as out:
            self.child = subprocess.Popen(command, stdout=out, stderr=out)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        if self.child.poll() is None:
            self.child.terminate()
            self.child.wait()


@contextmanager
def leaving_on_signal() -> Iterator[None]:
    """SIGTERM ends this process by way of its contexts, so that it leaves no child behind."""

    def leave(*_: object) -> None:
        raise SystemExit(RESUMABLE)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def measured_rate(entry: Entry, flags: list[str], minutes: float) -> float:
    """Images per second of pretraining with its loader: the first steps of a run that is not kept.

    Raises:
        UserError, RunFailed: it cannot be trained.
    """
    batch, wanted = entry.options.optim.batch_size, min(_MOST, max(_LEAST, 60 * _SHARE * minutes))
    with tempfile.TemporaryDirectory(prefix="ssl_vit-") as scratch:
        out, told, last = Path(scratch) / "run", Path(scratch) / "told", f"{_LAST}st"
        own = ["--run.out", str(out), "--run.log-every", "5"]
        for option in ("length", "probe-every", "save-every"):
            own += [f"--run.{option}", last]
        with Process(entry, [*flags, *own], told) as run:
            found, ended = None, None
            while ended is None and (found is None or found[1] < wanted):
                time.sleep(0.2)
                ended = run.child.poll()
                found = rate_after(read_rows(out / METRICS_FILE), batch, _WARM_UP)
        if found is not None:
            return found[0]
        said = told.read_text(errors="replace").strip().splitlines() or ["nothing was said"]
        reason = re.sub("^(error|stopped): ", "", said[-1])
        raise (UserError if ended == 2 else RunFailed)(f"{entry.name}: {reason}")


def train(entry: Entry, flags: list[str], out: Path, steps: int, looks: int) -> None:
    """Pretraining of so many steps, from where it was.

    Raises:
        SystemExit: it was stopped by a signal, and has saved.
        RunFailed: it failed.
    """
    every = -(-steps // looks)
    own = ["--run.length", f"{steps}st", "--run.probe-every", f"{every}st", "--run.out", str(out)]
    with Process(entry, [*flags, *own]) as run:
        status = run.child.wait()
    if status in (RESUMABLE, 130):
        raise SystemExit(status)
    if status:
        raise RunFailed(f"{entry.name}: pretraining ended with status {status}; see above")


def judge(plan: Plan, encoder: str, label: str) -> dict[str, Any]:
    """Scores of an encoder by each evaluator; their protocol cards go to ``scores/``."""
    run, found = plan.entries[0].options.run, dict[str, Any]()
    config = CompareConfig(
        data=plan.data, encoders=(encoder,), device=run.device, precision=run.precision
    )
    for evaluator in JUDGES:
        result = measure(config, encoder, evaluator, plan.out)
        assert result is not None
        (score, *_), card, *_ = result
        card_file = f"scores/{label}-{evaluator}.json"
        write_card(plan.out / card_file, card, [score])
        about = {"value": score.value, "interval": score.interval, "features": score.features}
        found[evaluator] = {**about, "setting": score.setting, "card": card_file}
        log.info("%s, %s: %.1f", label, evaluator, score.value)
    return found


class Results:
    """Results: the report of a folder, written anew, with table and figure, after each piece.

    Raises:
        UserError: those in the folder are of other options, or another machine.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.path = plan, plan.out / "quality.json"
        device = resolve_device(plan.entries[0].options.run.device)
        card = machine_card(device, torch.get_num_threads())
        asked = plan.asked() | {"machine": machine(card["hardware"])}
        self.report: dict[str, Any] = {"benchmark": "quality", "asked": asked, **card}
        self.report |= {"runs": {}, "baselines": {}}
        if self.path.is_file():
            self.report = json.loads(self.path.read_text())
        for key, value in asked.items():
            then = self.report["asked"][key]
            rule = f"its results are of {key} {then!r}, not {value!r}; give another --out"
            check(then == value, f"--out is {str(plan.out)!r}; {rule}")

    def write(self) -> None:
        """Write the report, and once there is a score, table and figure."""
        write_text_atomically(self.path, json.dumps(self.report, indent=1) + "\n")
        found = by_recipe(self.report)
        if not found:
            return
        write_text_atomically(self.plan.out / "quality.md", markdown(self.report))
        drawn = []
        for recipe, runs in found.items():
            for run in runs:
                score = run["scores"]["knn"]
                end = (run["minutes"], score["value"], *score["interval"])
                drawn.append(Curve(recipe, run["curve"], end))
        axes = ("minutes of training", "k-NN in %: while training (lines), at the end (points)")
        path = self.plan.out / "quality.png"
        write_atomically(path, lambda temporary: curves(temporary, drawn, *axes))


def run_one(plan: Plan, entry: Entry, seed: int, results: Results) -> None:
    """One run: its rate, its training and its scores; what is done is not done again."""
    label, asked, batch = f"{entry.name}-seed{seed}", plan.config, entry.options.optim.batch_size
    out, flags = plan.out / "runs" / label, [*plan.flags, "--run.seed", str(seed)]
    run = results.report["runs"].setdefault(label, {"recipe": entry.name, "method": entry.method})
    if "scores" in run:
        log.info("%s is done", label)
        return
    if "planned" not in run:
        rate = measured_rate(entry, flags, asked.minutes)
        steps = fitted_steps(rate, batch, asked.minutes)
        run |= {"seed": seed, "config": f"runs/{label}/{CONFIG_FILE}"}
        run["planned"] = {"minutes": asked.minutes, "images_per_second": rate, "steps": steps}
        results.write()
    steps = run["planned"]["steps"]
    text = "%s: %d steps of %d images in %g minutes"
    log.info(text, label, steps, batch, asked.minutes)
    train(entry, flags, out, steps, asked.looks)
    record = read_run(out)
    minutes = minutes_at(record.rows, batch)
    used = minutes[-1][1]
    if abs(used / asked.minutes - 1) > _TOLERANCE:
        text = "warning: %s took %.3g minutes instead of %g: the machine's speed has changed"
        log.warning(text, label, used, asked.minutes)
    run |= {"minutes": used, "images_seen": steps * batch}
    run["images_per_second"] = steps * batch / (60 * used)
    scores = judge(plan, str(out), label)
    run["curve"] = curve(record.rows, scores["knn"]["features"], minutes)
    run["scores"] = scores
    results.write()


def baselines(plan: Plan, first: int, results: Results) -> None:
    """Scores of raw pixels, and of each network of the recipes with random weights.

    ``first``: the first seed.
    """
    known, networks = results.report["baselines"], set()
    folders = {entry.name: plan.out / f"runs/{entry.name}-seed{first}" for entry in plan.entries}
    wanted = {PIXELS: f"pixels:{folders[plan.entries[0].name]}"}
    for name, folder in folders.items():
        network = str(asdict(read_info(folder / ENCODER_FILE).config))
        if network not in networks:
            wanted[f"untrained, as {name}"] = f"random:{folder}"
        networks.add(network)
    for name, encoder in wanted.items():
        if name not in known:
            known[name] = {"scores": judge(plan, encoder, re.sub(r"\W+", "-", name))}
            results.write()


def compare(plan: Plan) -> int:
    """``benchmark quality``; returns the exit status."""
    started = time.perf_counter()
    options = plan.entries[0].options
    open_sources(plan.data, options.data.channels)
    check(not plan.out.is_file(), f"--out is {str(plan.out)!r}, a file; give a folder")
    results = Results(plan)
    (plan.out / "scores").mkdir(parents=True, exist_ok=True)
    first = options.run.seed
    with leaving_on_signal():
        for seed in range(first, first + plan.config.seeds):
            for entry in plan.entries:
                run_one(plan, entry, seed, results)
        baselines(plan, first, results)
    title = f"{plan.config.minutes:g} minutes each; {plan.data.val}, in %, ± half of the interval"
    show_table(title, list(table(results.report)), header=HEADER)
    for name in ("quality.md", "quality.json", "quality.png"):
        print(plan.out / name)
    log.info("done in %s", duration(time.perf_counter() - started))
    return 0
