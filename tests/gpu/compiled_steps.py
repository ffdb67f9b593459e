"""Compiled steps beside eager ones: ``python -m tests.gpu.compiled_steps DEVICE METHOD ...``.

In a process of its own, where annotations are not checked, which no compiler follows. It prints a
line of JSON for each method: both ways' losses, and the graphs that there are after two steps and
at the end.
"""

import json
import sys

import torch

from tests.contract import tiny

OPTIONS = ("--encoder.drop-path", "0.4", "--encoder.depth", "4")


def losses(name: str, device: str, compiled: bool) -> tuple[list[float], list[int]]:
    """Losses of two steps and again of two, and the graphs after each two."""
    found, graphs = [], []
    made = tiny.session(name, *OPTIONS, "--run.device", device, "--run.compile", str(compiled))
    for _ in range(2):
        found += [scalars["loss"] for scalars in tiny.train(made, 2)]
        if compiled:
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return found, graphs


def main(device: str, names: list[str]) -> None:
    """Train each method both ways."""
    for name in names:
        eager, _ = losses(name, device, False)
        torch.compiler.reset()
        compiled, graphs = losses(name, device, True)
        row = {"method": name, "graphs": graphs, "eager": eager, "compiled": compiled}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
