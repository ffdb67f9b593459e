"""Comparison of training: our side and its peers, each in its own process, measured in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ssl_vit.benchmarks.measured import Speed, machine_card
from ssl_vit.benchmarks.own_process import OwnProcess
from ssl_vit.benchmarks.side import Workload
from ssl_vit.common.errors import RunFailed
from ssl_vit.common.task import Task

OURS = "ours"
Sides = dict[str, OwnProcess]


@dataclass
class Timing:
    """Timing of one side: seconds of each repeat, seconds waited for images, and the last loss."""

    speed: Speed
    waited: float = 0.0
    last_loss: float = math.nan


class Comparison:
    """Comparison: what one benchmark measures of each side; ``measure_training`` does the rest.

    Attributes:
        steps: steps of one repeat.
        lead_in: steps that each side takes before each repeat; they are not timed.

    Args:
        make: builds the method with its initial weights; it can be sent to another process.
        config: the options of the benchmark.
    """

    steps = 1
    lead_in = 0

    def __init__(self, work: Workload, make: Callable[[], Task], config: Any) -> None:
        self.work, self.make, self.config = work, make, config

    def sizes(self) -> dict[str, Any]:
        """Sizes of the workload, for JSON."""
        raise NotImplementedError

    def builds(self) -> dict[str, tuple[Any, ...]]:
        """Sides by name, ours first: the arguments of ``OwnProcess`` for each."""
        raise NotImplementedError

    def prepare(self, sides: Sides) -> None:
        """Measurements and warm-up before the timed repeats."""

    def report(self, sides: Sides, timings: dict[str, Timing]) -> dict[str, Any]:
        """Report entries, after the timed repeats: ``results`` of each side, ``breakdown`` ..."""
        raise NotImplementedError


def setting(comparison: Comparison) -> dict[str, Any]:
    """Head of a report, for JSON: the machine, the precision and the sizes."""
    work = comparison.work
    return {
        **machine_card(work.device, torch.get_num_threads()),
        "precision": str(work.precision).removeprefix("torch."),
        "sizes": comparison.sizes(),
    }


def measure_training(comparison: Comparison) -> dict[str, Any]:
    """Report of a comparison, for JSON.

    Raises:
        UserError: a side does not support these sizes.
        RunFailed: a loss is not finite, or a side's process ended.
    """
    work, repeats = comparison.work, comparison.config.repeats
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(OwnProcess(*build))
            for name, build in comparison.builds().items()
        }
        comparison.prepare(sides)
        timings = time_in_turn(
            sides, work.batch_size, repeats, comparison.steps, comparison.lead_in
        )
        found = comparison.report(sides, timings)
    return {
        **setting(comparison),
        "results": found.pop("results"),
        "ratios": found.pop("ratios"),
        **found,
    }


def time_in_turn(
    sides: Sides, batch_size: int, repeats: int, steps: int = 1, lead_in: int = 0
) -> dict[str, Timing]:
    """Timing of each side, from rounds in which one side after another takes ``steps`` steps.

    Raises:
        RunFailed: a loss is not finite: such a step may be skipped, which makes its time invalid.
    """
    timings = {name: Timing(Speed(batch_size * steps)) for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            if lead_in:
                side.ask("timed", lead_in)
            seconds, waited, loss = side.ask("timed", steps)
            if not math.isfinite(loss):
                raise RunFailed(f"the loss of {name} is {loss}; nothing was measured")
            timing = timings[name]
            timing.speed.seconds.append(seconds)
            timing.waited += waited
            timing.last_loss = loss
    return timings


def ratios(results: dict[str, dict[str, Any]], key: str) -> dict[str, float | None]:
    """Ratios of our value of ``key`` to that of each peer; None: one of the two is unknown."""
    ours = results[OURS][key]
    return {
        f"{OURS} / {name}": ours / found[key] if ours and found[key] else None
        for name, found in results.items()
        if name != OURS
    }


def shares(stages: dict[str, float]) -> dict[str, Any]:
    """Step breakdown, for JSON: seconds and share of each stage, and the sum of the seconds."""
    whole = sum(stages.values())
    return {
        "seconds": whole,
        "parts": {name: {"seconds": s, "share": s / whole} for name, s in stages.items()},
    }
