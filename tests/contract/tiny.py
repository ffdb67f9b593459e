"""A training of any method that takes a second: its own recipe for digits on a tiny encoder."""

import atexit
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_vit.commands.pretrain_options import PretrainConfig
from ssl_vit.commands.pretraining import Pretraining, build
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.task import Views
from ssl_vit.data.batch import Batch
from ssl_vit.data.loader import TrainImages, train_batches
from ssl_vit.methods.base import Method, find_method
from ssl_vit.model.encoder import Encoder
from ssl_vit.pretrain import parse_options
from ssl_vit.training.run_files import complete, read_rows
from ssl_vit.training.shards import Parts
from ssl_vit.weights.exchange import EncoderInfo, save_encoder
from ssl_vit.weights.own_files import ENCODER_FILE

STEPS, BATCH = 4, 8
# AdamW makes whole steps of what is a rounding error of a gradient near 0: the rate is low.
TINY = (
    *("--encoder.arch", "vit_tiny_patch16_224", "--encoder.image-size", "16"),
    *("--encoder.patch-size", "4", "--encoder.width", "32", "--encoder.depth", "2"),
    *("--encoder.heads", "2", "--encoder.drop-path", "0"),
    *("--data.train", "digits:train", "--data.val", "", "--data.holdout", "0"),
    *("--data.channels", "1", "--data.mean", "0.3", "--data.std", "0.4", "--data.workers", "0"),
    *("--optim.batch-size", f"{BATCH}", "--optim.lr", "1e-4", "--optim.warmup", "1st"),
    *("--run.length", f"{STEPS}st", "--run.save-every", f"{STEPS // 2}st", "--run.log-every", "1"),
    *("--run.probe-every", "1000ep", "--run.probe-images", "4"),
    *("--run.precision", "fp32", "--run.device", "cpu"),
)


def recipe(name: str) -> str:
    """The recipe that every method has."""
    return f"{name}_digits"


def arguments(name: str, *more: str) -> list[str]:
    """What the pretraining door is given; ``more`` wins."""
    return [name, "--config", recipe(name), *TINY, *given_encoders(name), *more]


def given_encoders(name: str) -> list[str]:
    """Options of a method that learns from other encoders, which are tiny, too."""
    options = find_method(name).encoders
    return [part for option in options for part in (f"--method.{option}", str(encoder_file()))]


@cache
def encoder_file() -> Path:
    """An encoder of another width and patch, for images of one channel."""
    config = EncoderConfig(
        "vit_tiny_patch16_224", image_size=(24,), patch_size=8, width=24, depth=2, heads=2
    )
    path = Path(tempfile.mkdtemp(prefix="ssl_vit_encoder")) / ENCODER_FILE
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        encoder = Encoder(config, 1)
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    save_encoder(path, encoder, EncoderInfo(config, 1, (0.3,), (0.4,)))
    return path


def run_arguments(name: str, *more: str) -> list[str]:
    """The same for a whole run, with stochastic depth, whose draws are a function of the step, and
    an encoder that is frozen at first, and being released where a run goes on."""
    held = ("--optim.freeze-encoder", "1st", "--optim.release", "2st", "--optim.layer-decay", "0.9")
    return arguments(name, "--encoder.drop-path", "0.2", *held, *more)


@cache
def options(name: str, *more: str) -> tuple[type[Method], PretrainConfig[Any]]:
    """The method's class and all options of a tiny run."""
    return find_method(name), parse_options(arguments(name, *more))[1]


def session(name: str, *more: str) -> Pretraining:
    """A tiny run put together; nothing is written."""
    return build(name, options(name, *more)[1])


def splitting(name: str) -> tuple[str, ...]:
    """Options with which parts of a batch are the batch."""
    given = find_method(name).splits_with
    return tuple(t for k, v in given.items() for t in (f"--method.{k.replace('_', '-')}", str(v)))


def batches(made: Pretraining, steps: int = STEPS) -> Iterator[Batch]:
    """The batches of the first steps, as the loop takes them."""
    images = TrainImages(made.images.train, made.views, 1, made.config.run.seed)
    return train_batches(images, made.order, 0, steps, workers=0, pin=False)


def first_views(made: Pretraining) -> Views:
    """The first of them as the method is given it."""
    return made.trainer.normalize(next(batches(made)).views)


def train(made: Pretraining, steps: int = STEPS) -> list[dict[str, float]]:
    """Train for some steps, without log and files; the scalars of each."""
    loaded, said = batches(made, steps), []
    made.task.train()
    for _ in range(steps):
        scalars = made.trainer.update([next(loaded) for _ in range(made.order.accumulate)])
        made.trainer.step += 1
        said.append({key: value.item() for key, value in scalars.items()})
    return said


def losses(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's steps."""
    return [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def weights(folder: Path) -> dict[str, Tensor]:
    """All weights and buffers of a run's last checkpoint."""
    parts = Parts(sorted(complete(folder / "checkpoints")[-1].glob("task*.safetensors")))
    return {name: parts.read(name) for name in parts.names}


def state(task: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of a method's state."""
    return {name: value.detach().clone() for name, value in task.state_dict().items()}


def assert_same_training(
    first: dict[str, Tensor], one: dict[str, Tensor], two: dict[str, Tensor]
) -> None:
    """Two trainings that began with ``first`` have moved every tensor alike, to rounding.

    By each tensor's own movement, for a teacher moves by a thousandth of what its student does. The
    bias of attention's keys is left out: its gradient is 0 but for rounding, of which AdamW makes
    whole steps.
    """
    assert first.keys() == one.keys() == two.keys()
    for key in first:
        start, a, b = (_without_key_bias(key, state[key].double()) for state in (first, one, two))
        allowed = 0.1 * (a - start).norm() + 3e-7 * a.norm()
        assert (b - a).norm() <= allowed, f"{key}: {(b - a).norm():.2g}, not {allowed:.2g}"


def _without_key_bias(key: str, value: Tensor) -> Tensor:
    if not key.endswith("attn.qkv.bias"):
        return value
    query, _, values = value.chunk(3)
    return torch.cat([query, values])


class Option(NamedTuple):
    """One option of a method.

    ``flag``: as on the command line. ``owner``: the options that it is one of, in which it is
    called ``name``.
    """

    flag: str
    owner: Any
    name: str
    value: Any


def method_options(config: Any, prefix: str = "--method") -> Iterator[Option]:
    """All options of a method, of its parts too."""
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), f"{prefix}.{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            yield from method_options(value, flag)
        else:
            yield Option(flag, config, field.name, value)
