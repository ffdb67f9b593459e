"""Parts of the proof on a device: what is asked, by which tests and doors, cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ssl_vit.benchmarks.device import Part
from ssl_vit.methods import method_of

_TESTS = Path(__file__).parents[2] / "tests" / "gpu"
# The step that is measured: recipe, images of a step, and the peer beside it in eager mode.
STEPS = (
    ("mae_vit_b16", 256, "huggingface"),
    ("dino_vit_s16", 64, "lightly"),
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
    on small networks, and nothing is proven."""
    for name, asks, least in (
        ("scores", "k-NN, linear probe and patch heads repeat, and are the CPU's", 20.0),
        ("prefetch", "batches arrive whole and in order", 10.0),
        ("step", "numbers against the CPU, waits of the host, NaN, out of memory", 30.0),
        ("memory", "peak memory of a step beside what scale predicts", 20.0),
        ("attention", "seconds of a step by kernel, gradients of a single query", 40.0),
    ):
        yield _tests(name, asks, least)
    for compiled in (False, True):
        for recipe, images, peer in STEPS:
            yield _step(recipe, images, "none" if compiled else peer, device, compiled)
    yield _tests("run", "kill and resume, scores again, two processes", 60.0)
    for method in dict.fromkeys(method_of(recipe) for recipe, *_ in STEPS):
        yield _prediction(method)


def _tests(name: str, asks: str, least: float) -> Part:
    file = _TESTS / f"test_{name}_gpu.py"
    arguments = ("-m", "pytest", "-s", "-q", "-p", "no:cacheprovider", "--junitxml", "{out}")
    return Part(name, asks, (*arguments, str(file)), least, ("pytest", "beartype"), (file,))


def _step(recipe: str, images: int, peer: str, device: str, compiled: bool) -> Part:
    small = device == "cpu"
    there = peer in _LIBRARIES and find_spec(_LIBRARIES[peer]) is not None
    against = peer if there and not small else "none"
    options: tuple[str, ...] = ("--config", recipe, "--batch-size", str(2 if small else images))
    options += ("--run.device", device, "--run.precision", "bf16", "--against", against)
    options += ("--run.compile", str(compiled), "--out", "{out}", *(_SMALL if small else ()))
    how = "compiled" if compiled else "eager"
    asks = f"images/s and share of peak of {recipe}, {how}"
    arguments = (*f"-m ssl_vit.benchmark step {method_of(recipe)}".split(), *options)
    return Part(f"{recipe} {how}", asks, arguments, 60.0 if compiled else 30.0)


def _prediction(method: str) -> Part:
    archs = [f"vit_{size}_patch16_224" for size in ("small", "base", "large")]
    options = ("--archs", *archs, "--image-sizes", "224", "--out", "{out}")
    arguments = (*f"-m ssl_vit.benchmark scale {method}".split(), *options)
    return Part(f"scale {method}", "memory as predicted, without a device", arguments, 30.0)
