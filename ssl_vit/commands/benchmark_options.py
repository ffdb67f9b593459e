"""Options of benchmarks of speed and scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from tyro.conf import Fixed, Suppress

from ssl_vit.commands.pretrain_options import PretrainConfig
from ssl_vit.common.checks import check_file, check_least, check_portion, check_positive
from ssl_vit.common.errors import check

M = TypeVar("M")

_LEAST = {"batch_size": 1, "repeats": 1, "warm_up": 0, "count": 1, "steps": 1}


@dataclass(frozen=True)
class _Shared(PretrainConfig[M]):
    config: str = ""
    """A YAML file of options, or a recipe by its name in configs/. The command line wins."""
    dry_run: Suppress[Fixed[bool]] = False
    against: str = "none"
    out: str = ""
    """JSON file for the report. Empty: none."""

    def __post_init__(self) -> None:
        for option, least in _LEAST.items():
            if hasattr(self, option):
                check_least(self, least, option)


@dataclass(frozen=True)
class LoaderConfig(_Shared[M]):
    """Loader benchmark: images per second that one core prepares, for a method's crops. Used are
    --data.train, --encoder, --method, --run.seed and --optim.batch-size; and --data.cache, measured
    beside the loader without it."""

    count: int = 256
    """At most this many images of --data.train, a seeded choice."""
    batch_size: int | None = None
    """Images prepared at once. None: --optim.batch-size. At most all images."""
    repeats: int = 3
    """Passes over the images, each with other crops."""
    against: str = "none"
    """Peers, measured in turn with ours; one or more, separated by commas: original (the reference
    implementation's whole chain in PIL and torchvision), lightly (its transform, in PIL too). One
    that a method does not have is refused with those it has."""


@dataclass(frozen=True)
class StepConfig(_Shared[M]):
    """Step benchmark: images per second of a whole training step (zero_grad, forward, backward,
    clipping, AdamW, teacher update), on noise in the sizes of a method's crops; with its FLOPs, its
    memory, and the best rate of matrix products of its own shapes. Used are --encoder, --method,
    --optim, --data.channels and, of --run, seed, device, precision, compile and
    activation-checkpointing."""

    batch_size: int = 8
    """Images of one step: noise, without photometric operations, which loader measures."""
    repeats: int = 5
    """Timed steps (on CUDA each is eight, without a wait between them), and as many again for the
    breakdown of a step."""
    warm_up: int = 3
    """Untimed steps before them."""
    baseline: str = ""
    """Report of an earlier step of the method on this machine (its --out): images/s and memory are
    shown as ratios to it, with the versions and options that differ. Empty: none."""
    against: str = "none"
    """Peers, measured in turn with ours in the same sizes and precision, each in its own process;
    one or more, separated by commas: original (the reference's modules, written from the paper),
    huggingface, huggingface-fp32 (its default), lightly (as in its example), lightly-grouped (views
    of one size together, as in its ImageNet benchmark). A name that a method does not have is
    refused with those it has."""


@dataclass(frozen=True)
class EndToEndConfig(_Shared[M]):
    """End-to-end benchmark: images per second of training on real images, with loader, transfer,
    device half and step. Used are --encoder, --method, --optim, --data.train, --data.channels,
    --data.workers and, of --run, seed, device, precision, compile and activation-checkpointing."""

    count: int = 256
    """At most this many images of --data.train, a seeded choice, used again and again."""
    batch_size: int = 8
    """Images of one step."""
    steps: int = 10
    """Consecutive steps of one repeat."""
    repeats: int = 3
    """Timed repeats."""
    warm_up: int = 1
    """Untimed steps before each repeat, in addition to those that use up the batches prepared while
    the other side was measured."""
    against: str = "none"
    """Peer, measured in turn with ours: original (the reference implementation's step and its whole
    chain in PIL, with as many workers)."""


def check_out(out: str) -> None:
    """Check of the report's path, before anything is measured.

    Raises:
        UserError: no report can be written there.
    """
    check_file(out, "the report is a JSON file", ".json")


@dataclass(frozen=True)
class ScaleConfig(PretrainConfig[M]):
    """Scale estimate: FLOPs and memory of a step by encoder and image size, counted without a
    device, and the predicted time of whole runs. Stochastic depth, which saves some of the FLOPs,
    is not counted."""

    config: str = ""
    """A YAML file of options, or a recipe by its name in configs/. The command line wins."""
    archs: tuple[str, ...] = (
        "vit_tiny_patch16_224",
        "vit_small_patch16_224",
        "vit_base_patch16_224",
        "vit_large_patch16_224",
        "vit_huge_patch14_224",
    )
    """Encoders by timm's names, each at its own or at --encoder.image-size."""
    image_sizes: tuple[int, ...] = (224, 384, 512)
    """Side lengths of images in pixels, rounded down to whole patches, for --encoder.arch."""
    devices: tuple[int, ...] = (8, 64)
    """Numbers of devices to predict for."""
    peak: float = 989.0
    """Peak TFLOP/s of a device in bfloat16, without sparsity: 989 for an H200 (NVIDIA's data
    sheet)."""
    share: float = 0.5
    """Share of that peak that the steps reach. An assumption, not a measurement: what a ViT-L
    should reach; small encoders reach less. benchmark step measures yours."""
    memory: float = 139.0
    """Memory of a device in GiB: 139 for an H200. A tenth of it is reserved for temporary
    buffers."""
    count: int = 1_281_167
    """Images of an epoch: those of ImageNet-1k."""
    out: str = ""
    """JSON file for the report. Empty: none."""

    def __post_init__(self) -> None:
        for option in ("archs", "devices"):
            check(bool(getattr(self, option)), f"--{option} is empty; give one or more")
        check_least(self, 1, "devices", "image_sizes", "count")
        check_positive(self, "peak", "memory")
        check_portion(self, "share")
        check(
            self.run.precision != "fp32",
            "--run.precision is fp32; scale supports bf16 only, as do --peak and --share",
        )


# Options of each benchmark of a method, by name.
BENCHMARKS: dict[str, Any] = {
    "step": StepConfig,
    "loader": LoaderConfig,
    "end-to-end": EndToEndConfig,
    "scale": ScaleConfig,
}
