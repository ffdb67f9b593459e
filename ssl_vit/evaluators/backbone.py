"""Backbone: a frozen encoder of any origin, with its features and its image preparation."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ssl_vit.common.errors import UserError, check, did_you_mean
from ssl_vit.data.view import View
from ssl_vit.evaluators.features import Embed, pixels, pooled
from ssl_vit.evaluators.options import FEATURES, PATCHES
from ssl_vit.model.architecture import plain_architectures, rotary_architectures, without_memory
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import EncoderInfo, random_like, sha256
from ssl_vit.weights.from_timm import tensors_only
from ssl_vit.weights.official import open_weights, weights_info
from ssl_vit.weights.own_files import ENCODER_FILE
from ssl_vit.weights.reading import read_content
from ssl_vit.weights.sam import FORMAT, Sam, open_sam, timm_names
from ssl_vit.weights.unwrapping import unwrapped

log = logging.getLogger("ssl_vit")


@dataclass(frozen=True)
class Backbone:
    """Backbone: an encoder (or raw pixels) with all that an evaluator needs to know of it.

    ``module`` is None for raw pixels; ``info`` is None for networks other than plain ViTs;
    ``features`` are the available ones (keys of ``FEATURES``), ``folder`` the default for results.
    """

    name: str
    module: nn.Module | None
    view: View
    features: tuple[str, ...]
    identity: dict[str, Any]
    folder: Path
    info: EncoderInfo | None = None

    def embed(self, parts: tuple[str, ...]) -> Embed:
        """Embedding function: images to these feature parts, each (b, D); ``patches`` (b, N, D)."""
        if self.module is None:
            return pixels
        if isinstance(self.module, Encoder):
            blocks = max([int(p.partition("-")[2] or 1) for p in parts], default=1)
            made = pooled(self.module, blocks, PATCHES in parts)
        else:
            made = _whole(self.module)
        return lambda images: {part: value for part, value in made(images).items() if part in parts}

    @property
    def poolings(self) -> tuple[str, ...]:
        """Plain features, of one part each."""
        return tuple(f for f in self.features if len(FEATURES[f]) == 1)

    @property
    def network(self) -> dict[str, Any]:
        """Architecture settings that weights do not determine: the number of heads, epsilons."""
        return asdict(self.info.config) if self.info else {"arch": self.identity["arch"]}

    @property
    def label(self) -> str:
        """Short name for files: ``random-mae-digits`` for ``random:runs/mae-digits``."""
        kind = self.name.partition(":")[0] + "-"
        kind = kind if kind in ("random-", "pixels-") else ""
        name = self.name.rpartition(":")[2]
        if "file" not in self.identity:  # timm's name, whose last dot begins no extension
            return kind + name
        stem = Path(name).expanduser()
        return kind + (stem.parent.name if stem.name == ENCODER_FILE else stem.stem)

    @property
    def prefix(self) -> str:
        """Prefix of this encoder's result files; empty in its own run folder."""
        own = self.name.partition(":")[0] not in ("random", "pixels", "timm")
        whole = self.identity.get("file", "").endswith(ENCODER_FILE)
        return "" if own and whole else f"{self.label}-"


def result_file(given: str, backbone: Backbone, name: str) -> Path:
    """Path of a result: as given, or next to the encoder."""
    if given:
        return Path(given).expanduser()
    return backbone.folder / f"{backbone.prefix}{name}"


def open_backbone(name: str, seed: int, size: tuple[int, ...] = ()) -> Backbone:
    """Open the backbone that an ``--encoder`` argument names.

    A run folder, a weight file of any format that ``open_weights`` knows, ``timm:NAME``; with the
    prefix ``random:``, the same architecture with random weights, a function of ``seed``; with
    ``pixels:``, no encoder but the images it would be given.

    Args:
        size: height and width of the images in pixels, or one number; empty: the encoder's own.

    Raises:
        UserError: it does not exist, or its weights do not fit.
    """
    check(bool(name), "--encoder is missing")
    kind, _, rest = name.partition(":")
    if kind == "timm" or (kind == "random" and rest.startswith("timm:")):
        architecture = rest.removeprefix("timm:")
        if not _is_plain(architecture.partition(":")[0]):
            return _timm_backbone(name, architecture, kind == "random", seed, size)
    elif kind != "pixels":
        given = rest if kind == "random" else name
        if sam := open_sam(Path(given).expanduser()):
            log.info("%s: %s, %s", name, FORMAT, sam.report)
            whole = f"{sam.arch}:{given}"
            return _timm_backbone(name, whole, kind == "random", seed, size, sam)
    if kind in ("random", "pixels") and rest:
        info, path = weights_info(rest, size)
        module = random_like(info, seed) if kind == "random" else None
        origin: dict[str, Any] = {"format": kind, "seed": seed}
    else:
        opened = open_weights(name, size)
        info, path, module = opened.info, opened.path, opened.encoder
        origin = {"format": opened.format, "tensors": opened.report}
        made = f", {info.method} at step {info.step}" if info.step else ""
        log.info("%s: %s, %s%s", name, opened.format, opened.report, made)
    view = View(_size(size, info, module), info.channels, info.mean, info.std)
    identity = {"given": name, **origin, **file_identity(path), **asdict(info)}
    if module is not None:
        identity["weights_sha256"] = weights_sha256(module)
    ours = path is not None and (kind != "timm" or ":" in rest)  # else a library's cache
    folder = path.parent if path and ours else Path()
    return Backbone(name, module, view, _features(module), identity, folder, info)


def _features(module: Encoder | None) -> tuple[str, ...]:
    if module is None:
        return ("pixels",)
    if module.vit.cls_token is None:
        return ("mean",)
    deep = len(module.vit.blocks) >= 4
    return ("cls", "mean", "cls+mean", *(("cls4", "cls4+mean") if deep else ()))


def _size(size: tuple[int, ...], info: EncoderInfo, module: Encoder | None) -> tuple[int, int]:
    """Image height and width: as asked, or those of the encoder."""
    check(len(size) <= 2 and all(s > 0 for s in size), f"--size is {size}; one number or two")
    if module is None:
        with without_memory():
            module = Encoder(replace(info.config, positions="learned"), info.channels)
    if not size:
        return module.image_size
    patch = module.patch_size
    check_patches("--size", (size[0], size[-1]), patch)
    return size[0], size[-1]


def check_patches(option: str, size: tuple[int, ...], patch: int) -> None:
    """Check that patches of ``patch`` pixels fill images of a size that ``option`` gives.

    Raises:
        UserError: they do not.
    """
    shown = "x".join(map(str, size))
    check(
        all(side > 0 and side % patch == 0 for side in size),
        f"{option} is {shown}; it must be divisible by the patch size, {patch}",
    )


def _is_plain(architecture: str) -> bool:
    """True if a timm model is a plain ViT, to open as an ``Encoder``; others are used unchanged."""
    names = timm.list_models()
    base = architecture.partition(".")[0]
    check(base in names, f"timm knows no model {architecture!r}{did_you_mean(base, names)}")
    return base in plain_architectures() + rotary_architectures()


def _timm_backbone(
    name: str,
    architecture: str,
    random: bool,
    seed: int,
    size: tuple[int, ...],
    sam: Sam | None = None,
) -> Backbone:
    """Backbone of a timm network that is no plain ViT, with its pooled feature; ``sam``: of a file
    that was recognised without its name."""
    model_name, _, file = architecture.partition(":")
    options = sam.options if sam else {}
    module = timm_model(model_name, file, random, seed, size, options)
    wanted: Any = module.pretrained_cfg
    input_size = tuple(wanted["input_size"])
    if sam:
        input_size = (options["in_chans"], *options["img_size"])
    height, width = (size[0], size[-1]) if size else input_size[1:]
    view = View((height, width), input_size[0], tuple(wanted["mean"]), tuple(wanted["std"]))
    path = Path(file).expanduser() if file else None
    identity = {
        "given": name,
        "format": "random" if random else FORMAT if sam else "timm",
        "seed": seed,
        **file_identity(path),
        "arch": model_name,
        "weights_sha256": weights_sha256(module),
    }
    if sam and not sam.published:
        identity["arch_options"] = options
    folder = path.parent if path else Path()
    return Backbone(name, module, view, ("pooled",), identity, folder)


def timm_model(
    name: str,
    file: str,
    random: bool,
    seed: int,
    size: tuple[int, ...],
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Timm network without its classifier: with random weights, those of a file, or timm's own.

    ``options``: more arguments of ``timm.create_model``.

    Raises:
        UserError: the weights cannot be loaded, or do not fit.
    """
    fixed = options or {}
    path = Path(file).expanduser()
    check(not file or path.is_file(), f"--encoder is 'timm:{name}:{file}'; no such file")
    source: dict[str, Any] = {"pretrained": not random and not file}
    sizes: list[dict[str, Any]] = (
        [{"img_size": size if len(size) == 2 else size[0]}, {}] if size else [{}]
    )
    if name.partition(".")[0] in timm.list_models(module="vision_transformer_sam"):
        sizes = [{}]  # it resamples its positions itself, and those of a file keep their size
    for extra in sizes:  # only some networks take an image size
        try:
            with torch.random.fork_rng(devices=[]), tensors_only():
                torch.manual_seed(seed)
                module = timm.create_model(name, num_classes=0, **source, **fixed, **extra).eval()
                if file and not random:
                    _load(module, path)
                return module
        except UserError:
            raise
        except TypeError as error:
            if not extra:
                raise UserError(f"timm's {name}: {error}") from None
        except Exception as error:  # of the hub, the file or the state: many kinds
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the weights of timm's {name} cannot be loaded: {reason}") from None
    raise AssertionError("not reached")


def _load(module: Any, path: Path) -> None:
    """Load all weights of a timm network from a file with timm's names, without a classifier."""
    state = timm_names(unwrapped(read_content(path), str(path)).state)
    own = module.state_dict()
    classifier = module.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    head = tuple(f"{name}." for name in names)
    module.load_state_dict(
        {key: v for key, v in state.items() if key in own or not key.startswith(head)}
    )


def _whole(module: nn.Module) -> Embed:
    def embed(images: Tensor) -> dict[str, Tensor]:
        return {"pooled": module(images)}

    return embed


def file_identity(path: Path | None) -> dict[str, Any]:
    """Identity of a weight file: its path and the SHA-256 of its bytes."""
    return {"file": str(path), "sha256": sha256(path)} if path else {}


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 of all weights' names, dtypes, shapes and values, independent of the file format."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
