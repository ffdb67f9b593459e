"""A step beside those of peers, each in a process of its own, on the same inputs, in turn."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from ssl_vit.benchmarks.matmul_peak import better, matmul_peak
from ssl_vit.benchmarks.measured import Speed, describe, machine_card
from ssl_vit.benchmarks.our_step import OurStep
from ssl_vit.benchmarks.own_process import OwnProcess
from ssl_vit.benchmarks.peers import Peer, peer_names, peers_of
from ssl_vit.benchmarks.side import Work
from ssl_vit.common.config import RunFailed
from ssl_vit.common.task import Task
from ssl_vit.training.parallel import reuse_memory

log = logging.getLogger("ssl_vit")
OURS = "ours"


def step_peers(method: str, against: str) -> dict[str, type[Peer]]:
    """The peers named in ``--against``.

    Raises:
        UserError: one that this method does not have.
    """
    known: dict[str, type[Peer]] = peers_of(method, "PEERS")
    return {name: known[name] for name in peer_names(against, known, f"step {method}")}


def measure_steps(method: str, work: Work, make: Callable[[], Task], config: Any) -> dict[str, Any]:
    """The report on our step and those of peers, for JSON.

    Args:
        make: the method with its first weights; it can be sent to another process.
        config: the options of the door.

    Raises:
        UserError: a peer that this method does not have, or that cannot be had in these sizes.
    """
    peers = step_peers(method, config.against)
    with ExitStack() as stack:
        ours = stack.enter_context(OwnProcess(OurStep.build, work, make, config.run))
        sides = {OURS: ours}
        for name, peer in peers.items():
            sides[name] = stack.enter_context(OwnProcess(peer.build, work))
        parameters = {n: s.ask("parameters") for n, s in sides.items()}
        alike = {n: s.ask("precision") == work.precision for n, s in sides.items()}
        speeds, losses = time_steps(sides, work.batch_size, config.warm_up, config.repeats)
        memory = {n: s.ask("peak_memory") for n, s in sides.items()}
        # Only now, as what a count leaves behind would be taken for a step's own memory.
        flops = {n: s.ask("flops") for n, s in sides.items()}
        reuse_memory(work.device)
        peak_of = partial(matmul_peak, ours.ask("products"), work.device, work.precision)
        first = peak_of()
        parts = ours.ask("breakdown", config.repeats)
        peak = better(first, peak_of())
    results = {}
    for name, speed in speeds.items():
        per_image = flops[name] / work.batch_size
        rate, best = per_image * speed.rate, peak["flops_per_second"]
        results[name] = {
            **speed.card(),
            "flops_per_image": per_image,
            "flops_per_second": rate,
            "share_of_peak": rate / best if best and alike[name] else None,
            "peak_memory_bytes": memory[name],
            "parameters": parameters[name],
            "last_loss": losses[name],
        }
    return {
        **machine_card(work.device, torch.get_num_threads()),
        "precision": str(work.precision).removeprefix("torch."),
        "sizes": {"batch_size": work.batch_size, "crops": describe(work.spec)},
        "results": results,
        **compare(results),
        "matmul_peak": peak,
        "breakdown": shares(parts),
    }


def compare(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Ours over each other's: images per second, and bytes of memory (None: unknown)."""
    ours = results[OURS]
    others = {n: found for n, found in results.items() if n != OURS}
    rate, bytes_ = "images_per_second", "peak_memory_bytes"
    ratios = {f"{OURS} / {n}": ours[rate] / o[rate] for n, o in others.items()}
    memory = {
        f"{OURS} / {n}": ours[bytes_] / o[bytes_] if ours[bytes_] and o[bytes_] else None
        for n, o in others.items()
    }
    return {"ratios": ratios, "memory_ratios": memory}


def shares(parts: dict[str, float]) -> dict[str, Any]:
    """Seconds of the parts of a step, their sum, and the share of it that each has."""
    whole = sum(parts.values())
    return {
        "seconds": whole,
        "parts": {name: {"seconds": s, "share": s / whole} for name, s in parts.items()},
    }


def time_steps(
    sides: dict[str, OwnProcess], batch_size: int, warm_up: int, repeats: int
) -> tuple[dict[str, Speed], dict[str, float]]:
    """Speed and last loss of each side, one step of each in turn; ``warm_up`` rounds before.

    Memory is looked at from the first step that counts.

    Raises:
        RunFailed: a loss is not finite: such a step may be skipped, and is no measure.
    """
    speeds, losses = {name: Speed(batch_size) for name in sides}, {}
    for i in range(-warm_up, repeats):
        for name, side in sides.items():
            if i == 0:
                side.ask("watch_memory")
            seconds, losses[name] = side.ask("timed")
            if not math.isfinite(losses[name]):
                raise RunFailed(f"the loss of {name} is {losses[name]}; nothing was measured")
            if i >= 0:
                speeds[name].seconds.append(seconds)
    return speeds, losses
