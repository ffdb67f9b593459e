"""Attention on CUDA, by each kernel that torch has: finite gradients, and the seconds of a step.

What is printed decides whether cuDNN's stays off, and whether what stochastic depth drops is
computed (``choose_attention``).
"""

import json
import subprocess
import sys
from statistics import median

import pytest
import torch
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tests.conftest import ROOT
from tests.gpu.conftest import surroundings
from tests.gpu.steps_of_dino import KERNELS


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_of_a_single_query_are_finite(kernel, device, say):
    """The query of [CLS] in the last block; with logits far below zero. Those of cuDNN, which is
    off, are told only."""
    if device.type != "cuda" and kernel != "math":
        pytest.skip("of CUDA")
    torch.manual_seed(0)
    found = []
    for scale in (1.0, 30.0):
        q = torch.randn(8, 6, 1, 64, device=device, dtype=torch.bfloat16) * scale
        k = -q + 0.1 * torch.randn(8, 6, 197, 64, device=device, dtype=torch.bfloat16)
        v = torch.randn_like(k)
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        try:
            with sdpa_kernel(KERNELS[kernel]):
                scaled_dot_product_attention(*inputs).float().square().sum().backward()
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            say(f"single query, {kernel}: no such kernel here")
            return
        found.append(all(bool(x.grad.isfinite().all()) for x in inputs))
    say(f"single query, {kernel}: gradients finite {found}")
    assert all(found) or kernel == "cudnn"


def test_steps_of_dino(device, say):
    """Whole branches by the chosen kernel, as in a run, take equally long from the third step on;
    the seconds of all others are told."""
    command = [sys.executable, "-m", "tests.gpu.steps_of_dino", str(device)]
    rows, pipe = [], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=surroundings(), stdout=pipe, text=True) as child:
        for line in child.stdout:
            rows.append(json.loads(line))
            describe(rows[-1], say)
    assert child.returncode == 0
    run = next(row for row in rows if row["kernel"] == "chosen" and row["whole"])
    if device.type == "cuda":
        assert max(run["seconds"][3:]) < 3 * median(run["seconds"][3:]) + 0.05


def describe(row: dict, say) -> None:
    """Say how long the steps of a way took, each, when it is known."""
    how = f"DINO {row['size'][0]}, {row['size'][1]} images, {row['kernel']}"
    how += ", whole" if row["whole"] else ", rows"
    found = row.get("seconds", [])
    say(f"{how}: {1000 * median(found[3:] or found):.1f} ms" if found else f"{how}: no such kernel")
    if found:
        say("  each: " + " ".join(f"{1000 * s:.0f}" for s in found))
