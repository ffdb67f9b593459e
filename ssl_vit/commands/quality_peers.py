"""Peers in the benchmark of quality per minute: trained for the same time as ours, and judged."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ssl_vit.benchmarks.loader import check_shallow
from ssl_vit.benchmarks.own_process import OwnProcess
from ssl_vit.benchmarks.peer_training import PeerTraining, asked_peers, chain_of, training_peers
from ssl_vit.benchmarks.peers import Peer
from ssl_vit.benchmarks.quality import WARM_UP, seconds_of_rate
from ssl_vit.commands.benchmarking import check_adamw, statistics, workload_of
from ssl_vit.commands.initial_weights import initial_method
from ssl_vit.commands.quality_options import Entry, Plan
from ssl_vit.common.checks import flag
from ssl_vit.common.errors import RunFailed, check
from ssl_vit.data.sources import open_source
from ssl_vit.methods.base import find_method
from ssl_vit.training.parallel import loader_workers
from ssl_vit.weights.exchange import read_info
from ssl_vit.weights.own_files import ENCODER_FILE

log = logging.getLogger("ssl_vit")
_LINES = 20  # of a training's output
# Options by group that peers do not have.
_OURS_ALONE = {
    "init": ("encoder", "lora", "keep_near"),
    "optim": ("freeze_encoder", "release", "encoder_lr", "layer_decay", "patch_lr", "spike"),
}


def peers_of_entries(plan: Plan) -> dict[str, list[str]]:
    """Peers that are asked for, for each recipe by its name, checked to be able to train it.

    Raises:
        UserError: a name that no method has, or a recipe that a peer cannot train.
    """
    names = asked_peers(plan.config.against, [entry.method for entry in plan.entries])
    found = {}
    for entry in plan.entries:
        known = training_peers(entry.method)
        found[entry.name] = [name for name in names if name in known]
        if names and not found[entry.name]:
            log.info("%s: %s has no such peer", entry.name, entry.method)
        for name in found[entry.name]:
            _check_trainable(entry, name)
    return found


def _check_trainable(entry: Entry, name: str) -> None:
    """Check that a peer can do with a recipe what ours does; its networks are built, and dropped.

    Raises:
        UserError: an option that it does not have, or images that it would not read as ours does.
    """
    options, kind = entry.options, find_method(entry.method)
    check_adamw(options.optim)
    peer = training_peers(entry.method)[name]
    for group, names in _OURS_ALONE.items():
        given = getattr(options, group)
        for option in names:
            _check_default(given, option, name)
    if peer.clip is Peer.clip:
        _check_default(options.optim, "clip", name)
    # Not on the device, whose memory is for training.
    run = replace(options.run, device="cpu")
    work = workload_of(kind, replace(options, run=run), 1, statistics(options.data))
    chain_of(entry.method, name, work)
    with torch.random.fork_rng(devices=[]):
        peer.build(work)
    check_shallow(open_source(options.data.train, options.data, weighted=True), options, [name])


def _check_default(given: Any, option: str, name: str) -> None:
    value, default = getattr(given, option), getattr(type(given)(), option)
    rule = f"--against {name} has no such option; leave it at {default}"
    check(value == default, f"{flag(given, option)} is {value}; {rule}")


class PeerRun:
    """A peer's run of one of our recipes, in a process of its own, after ours of that seed."""

    def __init__(self, plan: Plan, entry: Entry, seed: int, name: str) -> None:
        self.plan, self.entry, self.seed, self.name = plan, entry, seed, name
        self.label = f"{entry.name}-{name}-seed{seed}"
        self.file = plan.out / "runs" / self.label / ENCODER_FILE
        self.encoder = str(self.file)

    def about(self) -> dict[str, Any]:
        """Entries of the run in the report, before it begins."""
        recipe = f"{self.entry.name}, {self.name}"
        return {"recipe": recipe, "method": self.entry.method, "seed": self.seed}

    def _process(self) -> OwnProcess:
        """Process of the peer's training, with the image statistics of our run."""
        entry, options = self.entry, self.entry.options
        options = replace(options, run=replace(options.run, seed=self.seed))
        ours, kind = self.plan.our_run(entry.name, self.seed), find_method(entry.method)
        info = read_info(ours / ENCODER_FILE)
        known = info.mean, info.std
        work = workload_of(kind, options, options.optim.batch_size, known)
        peer = training_peers(entry.method)[self.name]
        chain = chain_of(entry.method, self.name, work)
        source = open_source(options.data.train, options.data, weighted=True)
        workers = loader_workers(options.data.workers, work.device)
        make = partial(initial_method, kind, options)
        return OwnProcess(PeerTraining, work, peer, chain, source, workers, make, options.run)

    def is_trained(self) -> bool:
        """True once its encoder is written: a training that was stopped begins anew."""
        return self.file.is_file()

    def rate(self) -> float:
        """Images per second with its loader: the first steps of a training that is not kept."""
        with self._process() as side:
            seconds = seconds_of_rate(self.plan.config.minutes)
            rate: float = side.ask("rate", seconds, WARM_UP)
        return rate

    def train(self, steps: int) -> float:
        """Training of so many steps, from the beginning; returns the minutes that it took.

        Raises:
            RunFailed: a loss is not finite, or the process ended.
        """
        done, total, batch = 0, 0.0, self.entry.options.optim.batch_size
        with self._process() as side:
            side.ask("plan", steps)
            while done < steps:
                now = min(-(-steps // _LINES), steps - done)
                seconds, _, loss = side.ask("timed", now)
                done, total = done + now, total + seconds
                if not math.isfinite(loss):
                    raise RunFailed(f"{self.label}: the loss is {loss} at step {done}")
                text = "%s: step %d/%d  loss %.4g  %.0f img/s"
                log.info(text, self.label, done, steps, loss, now * batch / seconds)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            side.ask("export", self.file, self.entry.method)
        return total / 60

    def curve(self, feature: str) -> list[tuple[float, float]]:
        """No points: only its end is judged."""
        return []
