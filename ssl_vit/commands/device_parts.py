"""Parts of the proof on a device: questions, and the tests and doors that answer them.

Numbers first, then the speed of two recipes, then kills and resumes, then the larger networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ssl_vit.benchmarks.device import Part
from ssl_vit.methods import method_of

_TESTS = Path(__file__).parents[2] / "tests" / "gpu"
# Steps that are measured: recipe, images of a step, and the peer beside it in eager mode.
FIRST = (("mae_vit_b16", 256, "huggingface"), ("dino_vit_s16", 64, "lightly"))
LATER = (
    ("dino_vit_s16", 128, "lightly"),
    ("mae_vit_l16", 128, "huggingface"),
    ("dino_vit_b16", 32, "lightly"),
)
# The library that a peer needs.
_LIBRARIES = {"huggingface": "transformers", "lightly": "lightly"}
# The same steps, as small as a rehearsal on the CPU allows.
_SMALL = (
    *("--encoder.arch", "vit_tiny_patch16_224", "--encoder.depth", "1"),
    *("--encoder.image-size", "32", "--repeats", "1", "--warm-up", "1"),
)


def parts(device: str) -> Iterator[Part]:
    """All parts for a kind of device, in their order; on ``cpu`` a rehearsal: all parts are tried,
    on small networks, and nothing is proven. Those to run beside the others come first."""
    for method in dict.fromkeys(method_of(recipe) for recipe, *_ in FIRST):
        yield _prediction(method)
    for name, asks, least, most in (
        ("scores", "k-NN, linear probe and patch heads repeat, and are the CPU's", 15.0, 60.0),
        ("prefetch", "batches arrive whole and in order", 10.0, 30.0),
        ("step", "numbers against the CPU, waits of the host, NaN, out of memory", 30.0, 120.0),
        ("memory", "peak memory of a step beside what scale predicts", 15.0, 45.0),
    ):
        yield _tests(name, asks, least, most)
    yield from (_step(*step, device, False) for step in FIRST)
    yield _tests("attention", "seconds of a step by kernel, gradients of one query", 30.0, 100.0)
    yield _tests("compiled", "compiled steps are the eager ones, made in the first two", 25.0, 90.0)
    yield from (_step(*step, device, True) for step in FIRST)
    yield _tests("run", "kill and resume, the CPU's curve, scores again, too large", 60.0, 200.0)
    for compiled in (False, True):
        yield from (_step(*step, device, compiled) for step in LATER)


def _tests(name: str, asks: str, least: float, most: float) -> Part:
    file = _TESTS / f"test_{name}_gpu.py"
    options = ("-s", "-q", "-p", "no:cacheprovider", "--tb=line", "--disable-warnings")
    arguments = ("-m", "pytest", *options, "--junitxml", "{out}", str(file))
    return Part(name, asks, arguments, least, most, ("pytest", "beartype"), (file,))


def _step(recipe: str, images: int, peer: str, device: str, compiled: bool) -> Part:
    """Part of one measured step; a peer that fails costs only the comparison."""
    small, how = device == "cpu", "compiled" if compiled else "eager"
    images = max(2, images // 32) if small else images
    without = compiled or small or find_spec(_LIBRARIES[peer]) is None
    against = "none" if without else peer
    options: tuple[str, ...] = ("--config", recipe, "--batch-size", str(images))
    options += ("--run.device", device, "--run.precision", "bf16", "--run.compile", str(compiled))
    options += ("--out", "{out}", *(_SMALL if small else ()), "--against")
    arguments = (*f"-m ssl_vit.benchmark step {method_of(recipe)}".split(), *options)
    name, asks = f"{recipe} {how}, {images}", f"images/s and share of peak of {recipe}, {how}"
    alone = () if against == "none" else (*arguments, "none")
    least, most = (45.0, 100.0) if compiled else (25.0, 75.0)
    return Part(name, asks, (*arguments, against), least, most, otherwise=alone)


def _prediction(method: str) -> Part:
    archs = ("--archs", "vit_small_patch16_224", "--image-sizes", "224")
    arguments = (*f"-m ssl_vit.benchmark scale {method}".split(), *archs, "--out", "{out}")
    return Part(f"scale {method}", "memory as predicted, on the CPU", arguments, beside=True)
