"""Shared options: their groups and defaults, each stated once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from ssl_vit.common.checks import (
    check_below_one,
    check_least,
    check_length,
    check_not_negative,
    check_positive,
    check_size,
    flag,
)
from ssl_vit.common.errors import check

T = TypeVar("T")


@dataclass(frozen=True)
class RunConfig:
    """Run folder, length, checkpoints and probing of a run."""

    prefix: ClassVar[str] = "run"

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
    """Split of the work over processes. ddp: each holds the whole network. fsdp: each holds its
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
        check_length(self, "length", "save_every", "probe_every", positive=True)
        if self.keep_every:
            check_length(self, "keep_every", positive=True)
        check_positive(self, "timeout")
        check_least(self, 1, "keep", "log_every", "probe_images", "max_nonfinite")


@dataclass(frozen=True)
class EncoderConfig:
    """Vision Transformer: a timm architecture, and changes to it (0: none)."""

    prefix: ClassVar[str] = "encoder"

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
    stem: Literal["patch", "conv"] = "patch"
    """Stem, which turns pixels into tokens. patch: a linear map of each patch. conv: 3x3
    convolutions of stride 2; the patch size is a power of 2, and methods cannot hide patches."""
    positions: Literal["learned", "sincos"] = "learned"
    """Position embedding: learned, or fixed two-dimensional sine-cosine. Architectures of DINOv3
    have none, but turn queries and keys (RoPE)."""
    rope_coords: Literal["separate", "max", "min"] = "separate"
    """RoPE: rows and columns of patches have coordinates from -1 to 1 each; max, min: the longer or
    the shorter side has, and the other the same scale."""
    rope_periods: tuple[float, ...] = (100.0,)
    """RoPE: its base, or the least and the largest period, in such coordinates."""
    rope_shift: float = 0.0
    """RoPE in training: shift of each axis of the patches' coordinates (-1 to 1), at most this."""
    rope_jitter: float = 0.0
    """RoPE in training: factor of each axis, at most this, up or down. 0: none."""
    rope_rescale: float = 0.0
    """RoPE in training: factor of both axes together, at most this, up or down. 0: none; DINOv3's
    released encoders were trained with 2."""
    resampling: Literal["mixed", "timm", "mae", "dino"] = "mixed"
    """Resampling of positions for images of another size, bicubic. timm: to the size, antialiased.
    mae: to the size. dino: by (new + 0.1) / old. mixed: timm's, but dino's for smaller crops."""
    registers: int = -1
    """Register tokens beside [CLS]. -1: as the architecture has."""
    layer_scale: float = 0.0
    """Initial value of layer scale. 0: as the architecture has (mostly none)."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, growing linearly from the first."""
    norm: Literal["tokens", "pooled"] = "tokens"
    """Place of the final norm. tokens: on every token. pooled: on the pooled vector only, as in
    encoders that were fine-tuned so; patch features then have none."""
    norm_eps: float = 0.0
    """Epsilon of every LayerNorm. 0: as the architecture has (mostly 1e-6)."""

    def __post_init__(self) -> None:
        check_size(self, "image_size")
        check_least(self, 0, "patch_size", "width", "depth", "heads")
        check_least(self, -1, "registers")
        check_below_one(self, "drop_path", "norm_eps")
        check_not_negative(self, "layer_scale", "rope_shift", "rope_jitter", "rope_rescale")
        check_positive(self, "rope_periods")
        check(
            len(self.rope_periods) in (1, 2),
            f"{flag(self, 'rope_periods')} has {len(self.rope_periods)} values; allowed: the base, "
            "or the least and the largest period",
        )


@dataclass(frozen=True)
class InitConfig:
    """Initial weights of the encoder."""

    prefix: ClassVar[str] = "init"

    encoder: str = ""
    """A run folder or weight file of any kind that --encoder of the evaluators takes; architecture,
    channels and statistics are then its own by default. Image size, patch size and channels may
    differ: positions are resampled, filters resized or given to other channels. Empty: random."""
    heads: bool = False
    """The encoder is of a run folder of the same method, and all other weights of its last
    checkpoint (heads, teacher, centres) are taken, too: for a last phase at a larger image size."""
    channels: str = "mean"
    """Filters of --data.channels other than the encoder's, all scaled by its number over the new
    one. mean: the mean of all filters for each new channel, the first ones keep theirs; of fewer
    channels each gets the mean. repeat: the same over and over. red,green,blue,mean or 0,1,mean:
    a filter for each channel."""
    lora: int = 0
    """Rank of low-rank adapters, which are trained in place of the encoder: for a big one on a
    small machine. The encoder is a plain one at every moment. 0: none; 8 to 64 are usual."""
    keep_near: float = 0.0
    """Weight of a term of the loss that keeps features ([CLS], mean patch) near those of the
    initial encoder: one minus their cosine on a crop. It costs a pass of each more. 0: none."""

    def __post_init__(self) -> None:
        check_not_negative(self, "keep_near")
        check_least(self, 0, "lora")
        check(
            bool(self.encoder) or not self.lora,
            f"{flag(self, 'lora')} is {self.lora}; it adapts given weights: give "
            f"{flag(self, 'encoder')}",
        )
        check(
            bool(self.encoder) or not self.keep_near,
            f"{flag(self, 'keep_near')} is {self.keep_near:g}; it has no effect without "
            f"{flag(self, 'encoder')}",
        )
        check(
            bool(self.encoder) or not self.heads,
            f"{flag(self, 'heads')} is True; it needs {flag(self, 'encoder')} RUN",
        )
        check(
            all(self.channels.split(",")),
            f"{flag(self, 'channels')} is {self.channels!r}; it must be mean, repeat, or a name "
            "for each channel, as red,green,blue,mean",
        )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and its schedules."""

    prefix: ClassVar[str] = "optim"

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the weight matrices of transformer blocks, at AdamW's learning rate and weight
    decay, and AdamW for all else: more is learnt of each image, with costlier steps."""
    batch_size: int = 256
    """Images of one optimizer step, over all processes and accumulated parts (effective batch)."""
    accumulate: int = 1
    """Parts in which each process computes its share of the batch: less memory, the same step (but
    for mixup and erasing in fine-tuning: each part draws its own)."""
    base_lr: float = 1.5e-4
    """Learning rate for 256 images (sqrt: 1024); the peak follows by --optim.lr-rule."""
    lr_rule: Literal["linear", "sqrt"] = "linear"
    """linear: the peak is base_lr * batch_size / 256. sqrt: base_lr * sqrt(batch_size / 1024), as
    for DINOv2."""
    lr: float | None = None
    """Peak learning rate itself; replaces base_lr and its scaling."""
    min_lr: float = 0.0
    """Final learning rate of the cosine."""
    warmup: str = "10ep"
    """Linear warm-up from 0, as 10ep or 500st."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging factors; Muon's is 0.95."""
    weight_decay: float = 0.05
    """Decoupled weight decay, on weight matrices only (not on biases and other vectors)."""
    weight_decay_end: float | None = None
    """Final weight decay, reached by half a cosine. None: constant."""
    clip: float = 0.0
    """Largest gradient norm. 0: no clipping."""
    clip_by: Literal["global", "parameter", "network"] = "global"
    """Clip the norm over all parameters together, each parameter's own, or that of each network
    (encoder, heads), where a method has several."""
    spike: float = 0.0
    """Skip a step whose loss is more than this many standard deviations above its running mean.
    0: never; 6 catches steps that would ruin a run and few others."""

    def __post_init__(self) -> None:
        check_least(self, 1, "batch_size", "accumulate")
        check_not_negative(self, "base_lr", "min_lr", "weight_decay", "weight_decay_end")
        check_not_negative(self, "clip", "spike")
        check_positive(self, "lr")
        check_below_one(self, "betas")
        check_length(self, "warmup")

    @property
    def peak_lr(self) -> float:
        """Peak learning rate: ``lr``, or what ``lr_rule`` makes of ``base_lr``."""
        return self.lr if self.lr is not None else self.scaled(self.base_lr)[0]

    def scaled(self, base: float) -> tuple[float, str]:
        """The peak that ``lr_rule`` makes of a base learning rate, and how, in words."""
        if self.lr_rule == "sqrt":
            rate = base * math.sqrt(self.batch_size / 1024)
            return rate, f"{base:g} x sqrt({self.batch_size} / 1024)"
        return base * self.batch_size / 256, f"{base:g} x {self.batch_size} / 256"

    def scale_of(self, encoder: bool, above: int, patches: bool) -> float:
        """Factor of the learning rate of a parameter at this place (``task.Place``)."""
        return 1.0

    def held_back(self) -> tuple[str, str]:
        """Lengths for which the encoder is frozen, and in which it is then released."""
        return "0st", "0st"


def from_json(kind: type[T], given: Mapping[str, Any]) -> T:
    """Options of a kind, from JSON, whose lists are tuples there."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
