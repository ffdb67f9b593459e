"""Training of a peer for its encoder: its own loader and step, with the schedules of our recipe."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ssl_vit.benchmarks.chains import OriginalChain
from ssl_vit.benchmarks.peers import Peer, peer_names, peers_of
from ssl_vit.benchmarks.pipeline import PeerPipeline
from ssl_vit.benchmarks.side import Workload
from ssl_vit.common.config import RunConfig
from ssl_vit.common.errors import RunFailed, check
from ssl_vit.data.base import Source
from ssl_vit.methods.base import Method
from ssl_vit.training.optim import Schedule, set_rates
from ssl_vit.weights.exchange import EncoderInfo, save_encoder


class PeerTraining(PeerPipeline):
    """Peer's training, from the same first encoder and with the same schedules as ours.

    Args:
        make: builds our method with its initial weights; it can be sent to another process.
        run: its length is not used.

    Raises:
        UserError: the peer does not support these sizes.
    """

    skips = True

    def __init__(
        self,
        work: Workload,
        peer: type[Peer],
        chain: OriginalChain,
        source: Source,
        workers: int,
        make: Callable[[], Method],
        run: RunConfig,
    ) -> None:
        super().__init__(work, peer, chain, source, workers)
        self.ours, self.run = make(), run
        for vit in self.side.vits():
            vit.load_state_dict(self.ours.encoder.vit.state_dict())
        self.step = 0
        self.schedule: Schedule | None = None
        # Workers start before the clock does, as in our own runs.
        self.batches = itertools.chain([next(self.batches)], self.batches)

    def plan(self, steps: int) -> None:
        """Fit the schedules to a training of so many steps."""
        per_epoch = len(self.images.source) // self.work.batch_size
        run = replace(self.run, length=f"{steps}st")
        self.schedule = Schedule(run, self.work.optim, per_epoch, self.ours.peak_in_warmup)
        self.ours.set_length(steps, per_epoch)

    def learn(self, batch: list[Tensor]) -> Tensor:
        """One step, at the rates of its place in the schedules if there are any."""
        if self.schedule is not None:
            step = self.step
            rates = self.schedule.lr(step), self.schedule.weight_decay(step)
            set_rates(self.side.optimizer, *rates)
            self.side.at(self.ours.objective, step)
            self.step += 1
        return super().learn(batch)

    def rate(self, seconds: float, warm_up: int) -> float:
        """Images per second of training for so many seconds, after ``warm_up`` steps."""
        self.timed(warm_up)
        steps, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds:
            self.timed(1)
            steps += 1
        return steps * self.work.batch_size / passed

    def export(self, path: Path, method: str) -> None:
        """Write the encoder that is judged.

        Raises:
            RunFailed: its weights are not finite.
        """
        encoder, work = self.ours.exported_encoder(), self.work
        encoder.vit.load_state_dict(self.side.vits()[-1].state_dict())
        if not all(p.isfinite().all() for p in encoder.parameters()):
            raise RunFailed("its weights are not finite")
        info = EncoderInfo(encoder.config, work.channels, *work.statistics, method, self.step)
        save_encoder(path, encoder, info)


def training_peers(method: str) -> dict[str, type[Peer]]:
    """Peers of a method that can be trained for their encoder, by name: one of timm's ViTs."""
    known: dict[str, type[Peer]] = peers_of(method, "PEERS")
    return {name: peer for name, peer in known.items() if peer.vits is not Peer.vits}


def chain_of(method: str, name: str, work: Workload) -> OriginalChain:
    """The peer's own chain of augmentations, or, where it brings none, the original's.

    Raises:
        UserError: crops or a number of channels that the chain does not support.
    """
    check(not work.spec.phases, f"--against {name} has no phases of larger crops")
    own: dict[str, type[OriginalChain]] = peers_of(method, "CHAINS")
    kind = own.get(name.partition("-")[0], OriginalChain)
    return kind(work.spec, work.channels, *work.statistics)


def asked_peers(against: str, methods: list[str]) -> list[str]:
    """Peers that are asked for, each of which at least one of the methods has.

    Raises:
        UserError: a name that no method has.
    """
    known = dict.fromkeys(name for method in methods for name in training_peers(method))
    return peer_names(against, known, f"quality of {', '.join(methods)}")
