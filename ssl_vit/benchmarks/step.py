"""Step benchmark: our training step and those of peers on the same noise, measured in turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ssl_vit.benchmarks.comparison import (
    OURS,
    Comparison,
    Sides,
    Timing,
    ratios,
    shares,
    time_in_turn,
)
from ssl_vit.benchmarks.matmul_peak import better, matmul_peak
from ssl_vit.benchmarks.measured import describe
from ssl_vit.benchmarks.our_step import OurStep
from ssl_vit.benchmarks.peers import Peer, peer_names, peers_of
from ssl_vit.benchmarks.side import Workload
from ssl_vit.common.task import Task
from ssl_vit.training.parallel import prepare_device

# Steps of a repeat where the host runs ahead of the device, as in training; elsewhere it is one.
_AHEAD = {"cuda": 8}


def step_peers(method: str, against: str) -> dict[str, type[Peer]]:
    """Peers named in ``--against``.

    Raises:
        UserError: there is no such peer for this method.
    """
    known: dict[str, type[Peer]] = peers_of(method, "PEERS")
    return {name: known[name] for name in peer_names(against, known, f"step {method}")}


class StepComparison(Comparison):
    """Step benchmark: speed, FLOPs, share of the matmul peak and memory of each side's step.

    Raises:
        UserError: there is no such peer for this method.
    """

    def __init__(self, method: str, work: Workload, make: Callable[[], Task], config: Any) -> None:
        super().__init__(work, make, config)
        self.peers = step_peers(method, config.against)
        self.steps = _AHEAD.get(work.device.type, 1)

    def sizes(self) -> dict[str, Any]:
        """Batch size and crops."""
        return {"batch_size": self.work.batch_size, "crops": describe(self.work.spec)}

    def builds(self) -> dict[str, tuple[Any, ...]]:
        """Our step and those of the peers."""
        peers = {name: (peer.build, self.work) for name, peer in self.peers.items()}
        return {OURS: (OurStep.build, self.work, self.make, self.config.run), **peers}

    def prepare(self, sides: Sides) -> None:
        """Warm-up rounds; peak memory is measured from their end."""
        time_in_turn(sides, self.work.batch_size, self.config.warm_up)
        for side in sides.values():
            side.ask("watch_memory")

    def report(self, sides: Sides, timings: dict[str, Timing]) -> dict[str, Any]:
        """Results, ratios of speed and memory, matmul peak, kernels and breakdown of our step."""
        memory = {name: side.ask("peak_memory") for name, side in sides.items()}
        # After the memory: what counting FLOPs leaves behind is not memory of a step.
        flops = {name: side.ask("flops") for name, side in sides.items()}
        peak, stages = self._peak_and_stages(sides[OURS])
        results = {}
        for name, timing in timings.items():
            per_image = flops[name] / self.work.batch_size
            rate, best = per_image * timing.speed.rate, peak["flops_per_second"]
            comparable = best and sides[name].ask("precision") == self.work.precision
            results[name] = {
                **timing.speed.card(),
                "flops_per_image": per_image,
                "flops_per_second": rate,
                "share_of_peak": rate / best if comparable else None,
                "peak_memory_bytes": memory[name],
                "parameters": sides[name].ask("parameters"),
                "last_loss": timing.last_loss,
            }
        return {
            "results": results,
            "ratios": ratios(results, "images_per_second"),
            "memory_ratios": ratios(results, "peak_memory_bytes"),
            "matmul_peak": peak,
            "kernels": sides[OURS].ask("kernels"),
            "breakdown": shares(stages),
        }

    def _peak_and_stages(self, ours: Any) -> tuple[dict[str, Any], dict[str, float]]:
        """Matmul peak, the better of two measurements, and the stages of our step between them."""
        prepare_device(self.work.device)
        measure = partial(matmul_peak, ours.ask("products"), self.work.device, self.work.precision)
        first = measure()
        stages = ours.ask("breakdown", self.config.repeats)
        return better(first, measure()), stages
