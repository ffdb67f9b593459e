"""Options shared by all commands, each stated once, and user errors."""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


class UserError(ValueError):
    """User error, in one line: what was given, what is allowed, where it came from.

    ``everywhere``: raised by every process, so that only one needs to report it.
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class RunFailed(RuntimeError):  # noqa: N818
    """Run failure: a run cannot continue, not by a user error; its last checkpoint is complete.

    ``everywhere``: as for :class:`UserError`.
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


def check(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Hint for an unknown ``name``: `` (nearest known: x, y)``; an empty string if none is near."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (nearest known: {', '.join(close)})" if close else ""


@dataclass(frozen=True)
class Length:
    """Length of training: ``800ep`` (epochs, or parts of them) or ``5000st`` (optimizer steps)."""

    amount: float
    unit: Literal["ep", "st"]

    @classmethod
    def parse(cls, text: str, option: str) -> "Length":
        """Parse ``text``; ``option`` names it in the error."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(ep|st)", text.strip())
        if not found:
            raise UserError(f"{option} is {text!r}; allowed: epochs as 10ep, or steps as 500st")
        return cls(float(found[1]), "ep" if found[2] == "ep" else "st")

    def steps(self, steps_per_epoch: int) -> int:
        """Length in optimizer steps, rounded."""
        return round(self.amount * (steps_per_epoch if self.unit == "ep" else 1))


@dataclass(frozen=True)
class RunConfig:
    """Run folder, length, checkpoints and probing of a run."""

    out: str = ""
    """Run folder. Empty: runs/<method>-<data>, or for fine-tuning inside the encoder's run."""
    seed: int = 0
    """Everything random follows from this: weights, sample order, crops, masks."""
    length: str = "100ep"
    """Length of training: epochs as 100ep, or optimizer steps as 5000st."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 runs the model under bfloat16 autocast, losses in fp32. auto: bf16 where the device has
    bfloat16 arithmetic (CPUs too), else fp32."""
    compile: bool = False
    """Compile each transformer block with torch.compile (on CPUs this needs a C++ compiler)."""
    device: str = "auto"
    """auto (CUDA, else Apple's MPS, else CPU), cpu, cuda, cuda:1 or mps."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the work. ddp: each holds the whole network. fsdp: each holds its
    part of weights and moments, gathered block by block (FSDP2): for networks too big for ddp."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, a third more compute,
    the same numbers."""
    timeout: float = 60.0
    """Minutes that a process waits for another before the run fails. A hung process is reported,
    with its stack, before that."""
    resume: str = "auto"
    """auto: resume from the newest complete checkpoint in the run folder. never: start anew (an
    existing run is renamed, not deleted). PATH: where the run folder has no checkpoint yet, start
    from that checkpoint folder."""
    save_every: str = "1ep"
    """Write a checkpoint this often, as 1ep or 500st; one is always written at the end."""
    keep: int = 2
    """Checkpoints to keep, the newest ones."""
    keep_every: str = ""
    """Interval of checkpoints that are kept permanently, as 100ep or 5000st. Empty: none."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl and TensorBoard, which are means over the interval."""
    probe_every: str = "10ep"
    """Probe the encoder this often (collapse, k-NN, pictures), as 10ep or 500st."""
    probe_images: int = 10000
    """At most this many training images, and as many held-out ones, are used to probe it."""
    max_nonfinite: int = 10
    """Stop after this many steps in a row with a non-finite loss or gradient (each is skipped);
    checked every --run.log-every steps."""

    def __post_init__(self) -> None:
        for option in ("length", "save_every", "probe_every"):
            flag = f"--run.{option.replace('_', '-')}"
            span = Length.parse(getattr(self, option), flag)
            check(span.amount > 0, f"{flag} is {getattr(self, option)!r}; it must be above 0")
        if self.keep_every:
            kept = Length.parse(self.keep_every, "--run.keep-every").amount
            check(kept > 0, f"--run.keep-every is {self.keep_every!r}; it must be above 0")
        minutes = self.timeout
        check(0 < minutes < math.inf, f"--run.timeout is {minutes:g} minutes; it must be above 0")
        for option in ("keep", "log_every", "probe_images", "max_nonfinite"):
            value = getattr(self, option)
            flag = f"--run.{option.replace('_', '-')}"
            check(value >= 1, f"{flag} is {value}; it must be at least 1")


@dataclass(frozen=True)
class DataConfig:
    """Images and how they are read."""

    train: str = "digits:train"
    """Training images: digits, folder:PATH (sub-folders are classes), flat:PATH (unlabelled),
    tar:PATH-{000000..000146}.tar, torchvision:NAME:ROOT[:SPLIT], hf:NAME_OR_PATH[:SPLIT]."""
    val: str = ""
    """Held-out images, in the same form. Empty: --data.holdout images of the training set."""
    holdout: int = 500
    """Without --data.val, this many training images (at most a tenth) are held out."""
    channels: int = 3
    """Channels of an image: 3 (gray is repeated), 1 (colour turns gray), or what the files have."""
    statistics: Literal["default", "auto"] = "default"
    """default: ImageNet's mean and standard deviation for 3 channels, estimated for others.
    auto: estimated from 2000 training images. Without effect when --data.mean is given."""
    mean: tuple[float, ...] = ()
    """Mean per channel, images scaled to 0..1."""
    std: tuple[float, ...] = ()
    """Standard deviation per channel, images scaled to 0..1."""
    workers: int = -1
    """Loader processes for each training process. -1: one for each core it has (when it trains on
    the CPU itself, for every second one), at most 16."""
    max_bad: float = 0.05
    """Stop when more than this share of the images is unreadable."""

    def __post_init__(self) -> None:
        check(self.channels >= 1, f"--data.channels is {self.channels}; it must be at least 1")
        check(self.workers >= -1, f"--data.workers is {self.workers}; it must be -1 or more")
        check(self.holdout >= 0, f"--data.holdout is {self.holdout}; it must be 0 or more")
        check(0 <= self.max_bad <= 1, f"--data.max-bad is {self.max_bad}; it is a share, 0 to 1")
        check(len(self.mean) == len(self.std), "--data.mean and --data.std go together")
        for option in ("mean", "std"):
            n = len(getattr(self, option))
            check(
                n in (0, self.channels),
                f"--data.{option} has {n} values; --data.channels is {self.channels}",
            )
        check(all(s > 0 for s in self.std), f"--data.std is {self.std}; it must be above 0")


@dataclass(frozen=True)
class EncoderConfig:
    """Vision Transformer: a timm architecture, and changes to it (0: none)."""

    arch: str = "vit_small_patch16_224"
    """A plain ViT of timm by name: vit_tiny_patch16_224 ... vit_huge_patch14_224."""
    image_size: tuple[int, ...] = ()
    """Height and width in pixels, or one number for both; divisible by the patch size."""
    patch_size: int = 0
    """Side of a patch in pixels."""
    width: int = 0
    """Features of a token."""
    depth: int = 0
    """Transformer blocks."""
    heads: int = 0
    """Attention heads of each block; they divide the width."""
    positions: Literal["learned", "sincos"] = "learned"
    """Position embedding: learned, or fixed two-dimensional sine-cosine."""
    registers: int = -1
    """Register tokens beside [CLS]. -1: as the architecture has."""
    layer_scale: float = 0.0
    """Initial value of layer scale. 0: as the architecture has (mostly none)."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, growing linearly from the first."""
    norm: Literal["tokens", "pooled"] = "tokens"
    """Where the final norm sits. tokens: on every token. pooled: on the pooled vector only, as in
    encoders that were fine-tuned so; patch features then have none."""
    norm_eps: float = 0.0
    """Epsilon of every LayerNorm. 0: as the architecture has (mostly 1e-6)."""

    def __post_init__(self) -> None:
        flag = "--encoder.image-size"
        check(len(self.image_size) <= 2, f"{flag} is {self.image_size}; one number or two")
        for option in ("patch_size", "width", "depth", "heads"):
            value = getattr(self, option)
            check(value >= 0, f"--encoder.{option.replace('_', '-')} is {value}; 0 or more")
        check(self.registers >= -1, f"--encoder.registers is {self.registers}; -1 or more")
        check(
            0 <= self.drop_path < 1, f"--encoder.drop-path is {self.drop_path}; it lies in [0, 1)"
        )
        check(self.layer_scale >= 0, f"--encoder.layer-scale is {self.layer_scale}; 0 or more")
        check(0 <= self.norm_eps < 1, f"--encoder.norm-eps is {self.norm_eps}; it lies in [0, 1)")


@dataclass(frozen=True)
class InitConfig:
    """Initial weights of the encoder."""

    encoder: str = ""
    """A run folder or weight file of any kind that --encoder of the evaluators takes; architecture,
    channels and statistics are then its own by default (image size may differ). Empty: random."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedules."""

    batch_size: int = 256
    """Images of one optimizer step, over all processes and accumulated parts (effective batch)."""
    accumulate: int = 1
    """Parts in which each process computes its share of the batch: less memory, the same step (but
    for mixup and erasing in fine-tuning: each part draws its own)."""
    base_lr: float = 1.5e-4
    """Learning rate for 256 images; the peak is base_lr * batch_size / 256."""
    lr: float | None = None
    """Peak learning rate itself; replaces base_lr and its scaling."""
    min_lr: float = 0.0
    """Final learning rate of the cosine."""
    warmup: str = "10ep"
    """Linear warm-up from 0, as 10ep or 500st."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging factors."""
    weight_decay: float = 0.05
    """Decoupled weight decay, on weight matrices only (not on biases and other vectors)."""
    weight_decay_end: float | None = None
    """Final weight decay, reached by half a cosine. None: constant."""
    clip: float = 0.0
    """Largest gradient norm. 0: no clipping."""
    clip_by: Literal["global", "parameter"] = "global"
    """Clip the norm over all parameters together, or each parameter's own."""
    spike: float = 0.0
    """Skip a step whose loss is more than this many standard deviations above its running mean.
    0: never; 6 catches steps that would ruin a run and few others."""

    def __post_init__(self) -> None:
        for option in ("batch_size", "accumulate"):
            value = getattr(self, option)
            check(value >= 1, f"--optim.{option.replace('_', '-')} is {value}; at least 1")
        for option in ("base_lr", "min_lr", "weight_decay", "clip", "spike"):
            value = getattr(self, option)
            flag = f"--optim.{option.replace('_', '-')}"
            check(value >= 0 and math.isfinite(value), f"{flag} is {value}; it must be 0 or more")
        check(self.lr is None or self.lr > 0, f"--optim.lr is {self.lr}; it must be above 0")
        decay = self.weight_decay_end
        fine = decay is None or 0 <= decay < math.inf
        check(fine, f"--optim.weight-decay-end is {decay}; it must be 0 or more")
        check(all(0 <= b < 1 for b in self.betas), f"--optim.betas is {self.betas}; each in [0, 1)")
        Length.parse(self.warmup, "--optim.warmup")

    @property
    def peak_lr(self) -> float:
        """Peak learning rate: ``lr``, or ``base_lr * batch_size / 256``."""
        return self.lr if self.lr is not None else self.base_lr * self.batch_size / 256
