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
    WARM_UP,
    by_recipe,
    curve,
    fitted_steps,
    markdown,
    minutes_at,
    rate_after,
    seconds_of_rate,
    table,
)
from ssl_vit.commands.cli import RESUMABLE, show_table
from ssl_vit.commands.compare_options import CompareConfig
from ssl_vit.commands.comparing import measure
from ssl_vit.commands.evaluating import open_sources
from ssl_vit.commands.quality_options import Entry, Plan
from ssl_vit.commands.quality_peers import PeerRun, peers_of_entries
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
_LAST = 20_000  # step after which a measurement of a rate ends by itself
# Share by which a run may miss its minutes without a warning.
_TOLERANCE = 0.05


class Process:
    """Pretraining by its own door, in a process of its own; leaving the context ends it, saved.

    ``output``: file for its output; None: standard error.
    """

    def __init__(self, entry: Entry, flags: Sequence[str], output: Path | None = None) -> None:
        door = f"-m ssl_vit.pretrain {entry.method}".split()
        command = [sys.executable, *door, "--config", str(entry.file), *flags]
        with nullcontext(2) if output is None else output.open("wb") as out:
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


class OurRun:
    """Our run of a recipe: ``pretrain`` by its own door."""

    def __init__(self, plan: Plan, entry: Entry, seed: int) -> None:
        self.plan, self.entry, self.seed = plan, entry, seed
        self.out = plan.our_run(entry.name, seed)
        self.label = self.out.name
        self.encoder = str(self.out)
        self.flags = [*plan.flags, "--run.seed", str(seed)]

    def about(self) -> dict[str, Any]:
        """Entries of the run in the report, before it begins."""
        return {"recipe": self.entry.name, "method": self.entry.method, "seed": self.seed}

    def is_trained(self) -> bool:
        """False: its own door knows what is done, and its curve is read after that."""
        return False

    def rate(self) -> float:
        """Images per second with its loader: the first steps of a run that is not kept.

        Raises:
            UserError, RunFailed: it cannot be trained.
        """
        wanted, entry = seconds_of_rate(self.plan.config.minutes), self.entry
        with tempfile.TemporaryDirectory(prefix="ssl_vit-") as scratch:
            out, output, last = Path(scratch) / "run", Path(scratch) / "output", f"{_LAST}st"
            own = ["--run.out", str(out), "--run.log-every", "5"]
            for option in ("length", "probe-every", "save-every"):
                own += [f"--run.{option}", last]
            with Process(entry, [*self.flags, *own], output) as run:
                found, ended = None, None
                while ended is None and (found is None or found[1] < wanted):
                    time.sleep(0.2)
                    ended = run.child.poll()
                    rows = read_rows(out / METRICS_FILE)
                    found = rate_after(rows, entry.options.optim.batch_size, WARM_UP)
            if found is not None:
                return found[0]
            said = output.read_text(errors="replace").strip().splitlines() or ["no output"]
            reason = re.sub("^(error|stopped): ", "", said[-1])
            raise (UserError if ended == 2 else RunFailed)(f"{entry.name}: {reason}")

    def train(self, steps: int) -> float:
        """Pretraining of so many steps, from where it was; returns the minutes that it took.

        Raises:
            SystemExit: it was stopped by a signal, and has saved.
            RunFailed: it failed.
        """
        every = -(-steps // self.plan.config.looks)
        own = ["--run.length", f"{steps}st", "--run.probe-every", f"{every}st"]
        with Process(self.entry, [*self.flags, *own, "--run.out", str(self.out)]) as run:
            status = run.child.wait()
        if status in (RESUMABLE, 130):
            raise SystemExit(status)
        if status:
            reason = f"pretraining ended with status {status}; see above"
            raise RunFailed(f"{self.entry.name}: {reason}")
        self.rows = read_run(self.out).rows
        self.minutes = minutes_at(self.rows, self.entry.options.optim.batch_size)
        return self.minutes[-1][1]

    def curve(self, feature: str) -> list[tuple[float, float]]:
        """(minutes, k-NN in percent) of each probe while training."""
        return curve(self.rows, feature, self.minutes)


def score_encoder(plan: Plan, encoder: str, label: str) -> dict[str, Any]:
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


def run_one(plan: Plan, side: OurRun | PeerRun, results: Results) -> None:
    """One run: its rate, its training and its scores; what is done is not done again."""
    label, asked, batch = side.label, plan.config, side.entry.options.optim.batch_size
    run = results.report["runs"].setdefault(label, side.about())
    if "scores" in run:
        log.info("%s is done", label)
        return
    if "planned" not in run:
        rate = side.rate()
        steps = fitted_steps(rate, batch, asked.minutes)
        config = plan.our_run(side.entry.name, side.seed) / CONFIG_FILE
        run["config"] = str(config.relative_to(plan.out))
        run["planned"] = {"minutes": asked.minutes, "images_per_second": rate, "steps": steps}
        results.write()
    steps = run["planned"]["steps"]
    text = "%s: %d steps of %d images in %g minutes"
    log.info(text, label, steps, batch, asked.minutes)
    used = run["minutes"] if "minutes" in run and side.is_trained() else side.train(steps)
    if abs(used / asked.minutes - 1) > _TOLERANCE:
        text = "warning: %s took %.3g minutes instead of %g: the machine's speed has changed"
        log.warning(text, label, used, asked.minutes)
    run |= {"minutes": used, "images_seen": steps * batch}
    run["images_per_second"] = steps * batch / (60 * used)
    results.write()
    scores = score_encoder(plan, side.encoder, label)
    run["curve"] = side.curve(scores["knn"]["features"])
    run["scores"] = scores
    results.write()


def baselines(plan: Plan, first: int, results: Results) -> None:
    """Scores of raw pixels, and of each network of the recipes with random weights.

    ``first``: the first seed.
    """
    known, networks = results.report["baselines"], set()
    folders = {entry.name: plan.our_run(entry.name, first) for entry in plan.entries}
    wanted = {PIXELS: f"pixels:{folders[plan.entries[0].name]}"}
    for name, folder in folders.items():
        network = str(asdict(read_info(folder / ENCODER_FILE).config))
        if network not in networks:
            wanted[f"untrained, as {name}"] = f"random:{folder}"
        networks.add(network)
    for name, encoder in wanted.items():
        if name not in known:
            known[name] = {"scores": score_encoder(plan, encoder, re.sub(r"\W+", "-", name))}
            results.write()


def compare(plan: Plan) -> int:
    """``benchmark quality``; returns the exit status."""
    started = time.perf_counter()
    options = plan.entries[0].options
    open_sources(plan.data, options.data.channels)
    check(not plan.out.is_file(), f"--out is {str(plan.out)!r}, a file; give a folder")
    peers = peers_of_entries(plan)
    results = Results(plan)
    (plan.out / "scores").mkdir(parents=True, exist_ok=True)
    first = options.run.seed
    with leaving_on_signal():
        for seed in range(first, first + plan.config.seeds):
            for entry in plan.entries:
                run_one(plan, OurRun(plan, entry, seed), results)
                for name in peers[entry.name]:
                    try:
                        run_one(plan, PeerRun(plan, entry, seed, name), results)
                    except RunFailed as error:
                        log.warning("warning: %s is left out: %s", name, error)
        baselines(plan, first, results)
    title = f"{plan.config.minutes:g} minutes each; {plan.data.val}, in %, ± half of the interval"
    show_table(title, list(table(results.report)), header=HEADER)
    for name in ("quality.md", "quality.json", "quality.png"):
        print(plan.out / name)
    log.info("done in %s", duration(time.perf_counter() - started))
    return 0
