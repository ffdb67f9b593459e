"""Proof on a device: ``python -m ssl_vit.benchmark device``, the ten minutes on a GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch

from ssl_vit.benchmarks.device import (
    Outcome,
    Part,
    carry_out,
    kill_running,
    markdown,
    steps_table,
)
from ssl_vit.benchmarks.measured import machine, machine_card
from ssl_vit.commands.cli import show_table
from ssl_vit.commands.device_options import DeviceConfig
from ssl_vit.commands.device_parts import parts
from ssl_vit.common.errors import check
from ssl_vit.common.files import write_text_atomically
from ssl_vit.training.metrics import duration
from ssl_vit.training.parallel import resolve_device


def prove(config: DeviceConfig) -> int:
    """``benchmark device``; returns the exit status: 1 when a part failed.

    Raises:
        UserError: there is no such device.
    """
    wanted = "cuda" if config.device == "auto" else config.device
    check(
        wanted == "cpu" or torch.cuda.is_available(),
        "no CUDA device is seen; --device cpu rehearses the parts on small networks",
    )
    device = resolve_device(wanted)
    out = Path(config.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    outcomes: dict[str, Outcome] = {}
    with closing(carried_out(list(parts(device.type)), 60 * config.minutes, wanted)) as found:
        for part, outcome in found:
            outcomes[part.name] = outcome
            _report_part(part.name, part.asks, outcome)
            _keep(out, config, device, outcomes)
    table = steps_table(outcomes)
    if table.rows:
        show_table(table.title, table.rows, table.header)
    for name in ("device.json", "device.md"):
        print(out / name)
    print(f"done in {duration(time.perf_counter() - started)}")
    return int(any(outcome.state == "failed" for outcome in outcomes.values()))


def carried_out(
    asked: list[Part], seconds: float, device: str
) -> Generator[tuple[Part, Outcome], None, None]:
    """Parts and their outcomes, one after another, all within so many seconds; those that need no
    device run beside the others, in turn, and come when they are done."""
    end = time.perf_counter() + seconds

    def outcome(part: Part) -> Outcome:
        return carry_out(part, end - time.perf_counter(), device)

    aside = ThreadPoolExecutor(1)
    beside = [(part, aside.submit(outcome, part)) for part in asked if part.beside]
    waiting = list(beside)
    try:
        for part in (part for part in asked if not part.beside):
            yield part, outcome(part)
            while waiting and waiting[0][1].done():
                yield waiting[0][0], waiting.pop(0)[1].result()
        yield from ((part, future.result()) for part, future in waiting)
    finally:  # one that is interrupted waits for nothing, and leaves nothing behind
        aside.shutdown(wait=False, cancel_futures=True)
        while any(future.running() for _, future in beside):
            kill_running()
            time.sleep(0.05)


def _report_part(name: str, asks: str, outcome: Outcome) -> None:
    print(f"{outcome.state:<11} {outcome.seconds:5.0f} s  {name}: {asks}", flush=True)
    for line in outcome.said:
        print(f"                     {line}", flush=True)


def _keep(
    out: Path, config: DeviceConfig, device: torch.device, outcomes: dict[str, Outcome]
) -> None:
    """Report and table of what is known so far: a machine that is taken away loses no part."""
    card = machine_card(device, torch.get_num_threads())
    found = {name: asdict(outcome) for name, outcome in outcomes.items()}
    report = {"benchmark": "device", **card, "options": asdict(config), "parts": found}
    write_text_atomically(out / "device.json", json.dumps(report, indent=1) + "\n")
    where = f"{card['date'][:10]}, {machine(card['hardware'])}, torch {card['versions']['torch']}"
    write_text_atomically(out / "device.md", markdown(steps_table(outcomes), where))
