"""Start of fine-tuning: the encoder that it begins with, adapted to the channels of the images."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError, check
from ssl_vit.data.view import View
from ssl_vit.evaluators.backbone import open_backbone, timm_model
from ssl_vit.model.encoder import Encoder
from ssl_vit.training.run_files import slug
from ssl_vit.weights.adapting import adapted
from ssl_vit.weights.exchange import EncoderInfo, encoder_of, info_of
from ssl_vit.weights.own_files import ENCODER_FILE

log = logging.getLogger("ssl_vit")
# Arguments by which timm loads other files.
_LOADS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


@dataclass(frozen=True)
class Start:
    """Initialization of fine-tuning: an encoder and how its images are prepared.

    ``module``: an :class:`Encoder`, or a network of timm without its classifier, ``arch`` then
    being its name. ``pretrained``: whether its weights are trained. ``mean``, ``std``: of its
    training images, empty where those of the new images are used. ``folder``: of its run.
    """

    module: nn.Module
    pretrained: bool
    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    identity: dict[str, Any]
    arch: str = ""
    folder: Path | None = None

    @property
    def weights(self) -> dict[str, str]:
        """Hash of its weights, by the option that names them; empty: they are random."""
        found = self.identity.get("weights_sha256") or self.identity.get("sha256")
        return {"encoder": found} if found else {}

    def default_folder(self, kind: str, images: str) -> Path:
        """Default folder of a run of this kind: inside the encoder's run; for other encoders named
        after the training images."""
        if self.folder is None:
            return Path(f"runs/{kind}-{slug(images)}")
        return self.folder / (kind if self.pretrained else f"random-{kind}")

    @property
    def depth(self) -> int | None:
        """Number of transformer blocks of a plain ViT; None for other networks."""
        return len(self.module.vit.blocks) if isinstance(self.module, Encoder) else None

    @property
    def body(self) -> dict[str, Any]:
        """Description for :func:`rebuilt`, which needs it besides weights, for JSON: of a plain ViT
        an ``EncoderInfo``, of others timm's name and arguments."""
        if isinstance(self.module, Encoder):
            info = EncoderInfo(self.module.config, self.channels, self.mean, self.std)
            return dataclasses.asdict(info)
        return {"arch": self.arch, "options": self.identity.get("arch_options", {})}


def open_start(
    name: str, scratch: EncoderConfig, channels: int, seed: int, size: tuple[int, ...] = ()
) -> Start:
    """Open an ``--encoder`` argument as the initialization of fine-tuning.

    ``none``: the architecture ``scratch`` with random weights, for ``channels`` image channels.
    ``size``: of the images, which a file that does not say its own is taken to be for.

    Raises:
        UserError: no such encoder, or it cannot be trained.
    """
    check(
        bool(name),
        "--encoder is missing: a run folder, a weight file, timm:NAME, or none",
    )
    if name == "none":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = Encoder(scratch, channels)
        identity = {"given": name, "seed": seed, "config": dataclasses.asdict(scratch)}
        return Start(encoder, False, encoder.image_size, channels, (), (), identity)
    # Only some of timm's other networks are built for a size.
    other = name.removeprefix("random:").startswith("timm:")
    found = open_backbone(name, seed, () if other else size)
    if found.module is None:
        raise UserError(f"--encoder is {name!r}; raw pixels cannot be fine-tuned")
    view, identity = found.view, found.identity
    of_run = Path(str(identity.get("file", ""))).name == ENCODER_FILE
    return Start(
        module=found.module,
        pretrained=not name.startswith("random:"),
        size=view.size,
        channels=view.channels,
        mean=view.mean,
        std=view.std,
        identity=identity,
        arch=str(identity.get("arch", "")),
        folder=found.folder if of_run else None,
    )


def for_channels(start: Start, channels: int, how: str) -> Start:
    """The same start for images of other channels: its filters adapted (``adapted``), and the
    statistics those of the new images.

    Raises:
        UserError: not a plain ViT, or ``how`` does not fit.
    """
    given = start.identity["given"]
    if channels == start.channels and how in ("mean", "repeat"):
        return start
    old = start.module
    check(
        isinstance(old, Encoder),
        f"--data.channels is {channels}; {given} takes images of {start.channels}, and only plain "
        "ViTs are adapted to others",
    )
    assert isinstance(old, Encoder)
    new = Encoder(old.config, channels)
    state, notes = adapted(old, new, how, f"--encoder {given}")
    new.vit.load_state_dict(state, strict=True)
    log.info("%s: %s", given, "; ".join(notes))
    identity = start.identity | {"adapted": notes}
    statistics = (start.mean, start.std) if channels == start.channels else ((), ())
    mean, std = statistics
    return dataclasses.replace(
        start, module=new.eval(), channels=channels, mean=mean, std=std, identity=identity
    )


def rebuilt(body: dict[str, Any], state: dict[str, Tensor], where: str, view: View) -> Start:
    """Start of the architecture that ``body`` is of (``Start.body``), for images of ``view``.

    A plain ViT has the weights ``state``; other networks have random ones. ``where``: the file.

    Raises:
        UserError: no such architecture, or weights that do not match it.
    """
    arch, module = str(body.get("arch", "")), None
    if arch:
        check_call(arch, body["options"], where)
        module = timm_model(arch, "", True, 0, (), body["options"])
    else:
        module = encoder_of(info_of({"body": body}, "body", where), state, where)
    shown = view.size, view.channels, view.mean, view.std
    return Start(module, True, *shown, {"given": where}, arch)


def check_call(arch: str, kwargs: dict[str, Any], where: str) -> None:
    """Check that a call of timm that a file asks for builds a network and loads nothing.

    Raises:
        UserError: it does.
    """
    known = arch.partition(".")[0] in timm.list_models()
    check(known, f"{where}: timm knows no network {arch!r}")
    check(not _LOADS & kwargs.keys(), f"{where}: its metadata would make timm load other files")
