"""End-to-end benchmark: training on real images, from files to weights, ours and peers in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ssl_vit.benchmarks.comparison import OURS, Comparison, Sides, Timing, ratios, shares
from ssl_vit.benchmarks.loader import some_images
from ssl_vit.benchmarks.measured import describe
from ssl_vit.benchmarks.peers import NONE, peer_names, peers_of
from ssl_vit.benchmarks.pipeline import QUEUED, OurPipeline, PeerPipeline
from ssl_vit.benchmarks.side import Workload
from ssl_vit.benchmarks.step import step_peers
from ssl_vit.benchmarks.trial import combined_throughput
from ssl_vit.common.errors import check
from ssl_vit.common.task import Task
from ssl_vit.training.parallel import loader_workers, own_cores


class EndToEndComparison(Comparison):
    """End-to-end benchmark: speed of each side's pipeline, and of its loader and step alone.

    Raises:
        UserError: as ``some_images``; no such peer, or fewer images than a batch has.
    """

    def __init__(self, method: str, work: Workload, make: Callable[[], Task], config: Any) -> None:
        super().__init__(work, make, config)
        allowed = ("original",) if peers_of(method, "CHAINS") else ()
        names = peer_names(config.against, allowed, f"end-to-end {method}")
        self.peers = step_peers(method, ",".join(names) or NONE)
        found = some_images(config, work.spec, work.statistics, names, method)
        self.source, self.unreadable, self.chains = found
        size, n = work.batch_size, len(self.source)
        check(size <= n, f"--batch-size is {size}; there are {n} images")
        self.workers = loader_workers(config.data.workers, work.device)
        self.steps = config.steps
        # Batches that workers prepared while another side was measured are used up first.
        self.lead_in = config.warm_up + QUEUED * self.workers

    def sizes(self) -> dict[str, Any]:
        """Images, batch size, steps of a repeat, workers and crops."""
        return {
            "source": self.source.spec,
            "images": len(self.source),
            "unreadable": self.unreadable,
            "batch_size": self.work.batch_size,
            "steps": self.steps,
            "workers": self.workers,
            "crops": describe(self.work.spec),
        }

    def builds(self) -> dict[str, tuple[Any, ...]]:
        """Our pipeline and those of the peers."""
        last, run = (self.source, self.workers), self.config.run
        peers = {
            name: (PeerPipeline, self.work, peer, self.chains[name], *last)
            for name, peer in self.peers.items()
        }
        return {OURS: (OurPipeline, self.work, self.make, run, *last), **peers}

    def prepare(self, sides: Sides) -> None:
        """Speed of each side's loader and step alone."""
        self.loaders = {n: side.ask("loader_alone", self.steps) for n, side in sides.items()}
        self.alone = {n: side.ask("step_alone", self.steps) for n, side in sides.items()}

    def report(self, sides: Sides, timings: dict[str, Timing]) -> dict[str, Any]:
        """Results, ratios of speed, and the breakdown of our step."""
        if self.lead_in:
            sides[OURS].ask("timed", self.lead_in)
        stages = sides[OURS].ask("breakdown", self.steps)
        results = {name: self._result(name, timing) for name, timing in timings.items()}
        return {
            "results": results,
            "ratios": ratios(results, "images_per_second"),
            "breakdown": shares(stages),
        }

    def _result(self, name: str, timing: Timing) -> dict[str, Any]:
        """Result of one side, for JSON."""
        size, speed = self.work.batch_size, timing.speed
        busy = torch.get_num_threads() if self.work.device.type == "cpu" else 0
        loader, step = self.loaders[name], size / self.alone[name]
        bound = combined_throughput(loader, step, self.workers, busy, own_cores()).bound
        return {
            **speed.card(),
            "seconds_of_a_step": size / speed.rate,
            "share_waiting_for_images": timing.waited / sum(speed.seconds),
            "loader_images_per_second": loader,
            "step_images_per_second": step,
            "bound": bound,
            "last_loss": timing.last_loss,
        }
