"""Classifier: an encoder with a classification head, as a timm network, and its weight file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError, check
from ssl_vit.evaluators.backbone import check_patches
from ssl_vit.evaluators.start import Start
from ssl_vit.model.architecture import set_norm_eps, stem_option, timm_kwargs
from ssl_vit.model.block import lean_blocks
from ssl_vit.model.drop_path import draw_for_whole_batch
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import HEAD, EncoderInfo, contiguous_state, load_strictly, write_own
from ssl_vit.weights.own_files import own_metadata

_POOLS = {"mean": "avg", "cls": "token"}
# Parameters without weight decay and with the lowest layer's rate, in any version of timm.
_TOKENS = ("cls_token", "reg_token", "pos_embed")


@dataclass(frozen=True)
class TimmCall:
    """Timm call that builds a network: all that plain timm needs besides the weights.

    ``norm_eps``: epsilon of every LayerNorm, for which timm has no argument; 0: timm's default.
    ``stem``: that of :class:`EncoderConfig`.
    """

    arch: str
    kwargs: dict[str, Any]
    norm_eps: float = 0.0
    stem: str = "patch"

    def build(self, drop_path: float, seed: int) -> Any:
        """Build the network, with random weights by ``seed``.

        Raises:
            UserError: timm's network does not take these arguments.
        """
        extra: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        extra |= stem_option(self.stem)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = timm.create_model(self.arch, **self.kwargs, **extra)
        except TypeError as error:
            hint = "--tune.drop-path 0, and no --tune.image-size, leave out what it may not take"
            raise UserError(f"timm's {self.arch}: {error}; {hint}") from None
        draw_for_whole_batch(network)
        lean_blocks(network)
        if self.norm_eps:
            set_norm_eps(network, self.norm_eps)
        return network


@dataclass(frozen=True)
class Classifier:
    """Classifier: a network, the timm call that builds it, its image size, its loaded tensors.

    ``encoder``: config of the :class:`Encoder` before the head; None for other networks.
    """

    network: Any
    call: TimmCall
    size: tuple[int, int]
    loaded: str
    encoder: EncoderConfig | None


def classifier(
    start: Start, classes: int, pooling: str, size: tuple[int, ...], drop_path: float, seed: int
) -> Classifier:
    """Build a timm network with the weights of ``start`` and a new classification head.

    Plain ViT: with ``mean`` of the patch tokens the encoder's final norm is dropped and a new one
    follows the pooling; with ``cls`` it is kept (He et al. 2022, appendix A.1, and its code).
    All other weights must match. Position embeddings are trained.

    Args:
        size: height and width of the images in pixels, or one number; empty: as ``start`` has.
        drop_path: stochastic depth of the last block.

    Raises:
        UserError: a size or a pooling that the network does not allow.
    """
    module = start.module
    if isinstance(module, Encoder):
        call, state, fresh = _of_encoder(module, classes, pooling, size)
    else:
        call, state, fresh = _of_network(start, classes, size)
    network = call.build(drop_path, seed)
    own = network.state_dict()
    state = {
        k: v for k, v in state.items() if k in own or not k.startswith(("norm.", "attn_pool."))
    }
    new = {k: v for k, v in own.items() if k not in state and k.startswith(fresh)}
    load_strictly(network, state | new, f"the classifier of {start.identity['given']}")
    if start.pretrained:
        start_head(network, seed)
    made = (size[0], size[-1]) if size else start.size
    loaded = f"{len(state)} of {len(own)} tensors, new: {', '.join(sorted(new))}"
    return Classifier(network, call, made, loaded, _encoder_config(module, pooling, size))


def _encoder_config(module: nn.Module, pooling: str, size: tuple[int, ...]) -> EncoderConfig | None:
    """Config of a fine-tuned plain ViT: learned positions, no stochastic depth."""
    if not isinstance(module, Encoder):
        return None
    old = module.config
    return dataclasses.replace(
        old,
        image_size=size or old.image_size,
        norm="pooled" if pooling == "mean" else old.norm,
        positions="learned",
        drop_path=0.0,
    )


def _of_encoder(
    encoder: Encoder, classes: int, pooling: str, size: tuple[int, ...]
) -> tuple[TimmCall, dict[str, Tensor], tuple[str, ...]]:
    """Timm call, the encoder's tensors for it, and name prefixes of the new tensors."""
    patch, vit = encoder.patch_size, encoder.vit
    check_patches("--tune.image-size", size, patch)
    check(
        pooling == "mean" or vit.cls_token is not None,
        "--tune.pooling is 'cls'; this encoder has no [CLS]: use mean",
    )
    state = dict(vit.state_dict())
    config = encoder.config
    if size:
        config = dataclasses.replace(config, image_size=size)
        parts = encoder.positions((size[0] // patch, size[-1] // patch))
        if not encoder.rotary:
            state["pos_embed"] = torch.cat([p for p in parts if p is not None], dim=1).detach()
    kwargs = timm_kwargs(config, encoder.channels)
    kwargs |= {"num_classes": classes, "global_pool": _POOLS[pooling]}
    return TimmCall(config.arch, kwargs, config.norm_eps, config.stem), state, (HEAD, "fc_norm.")


def _of_network(
    start: Start, classes: int, size: tuple[int, ...]
) -> tuple[TimmCall, dict[str, Tensor], tuple[str, ...]]:
    """Timm call, tensors and new name prefixes of a network other than a plain ViT."""
    kwargs: dict[str, Any] = {"num_classes": classes, **start.identity.get("arch_options", {})}
    module: Any = start.module
    if size and hasattr(module, "set_input_size"):  # of a fixed but adjustable image size
        module.set_input_size(img_size=(size[0], size[-1]))
        kwargs["img_size"] = [size[0], size[-1]]
    heads = module.pretrained_cfg["classifier"]
    names = (heads,) if isinstance(heads, str) else tuple(heads)
    return TimmCall(start.arch, kwargs), module.state_dict(), tuple(f"{n}." for n in names)


def start_head(network: Any, seed: int) -> None:
    """Initialize the head: truncated normal, sigma 2e-5; biases 0 (He et al. 2022)."""
    heads, generator = network.get_classifier(), torch.Generator().manual_seed(seed)
    for part in heads if isinstance(heads, tuple) else (heads,):
        head: Any = getattr(part, "fc", part)  # of SAM's, the pooling and the layer together
        nn.init.trunc_normal_(head.weight, std=2e-5, generator=generator)
        nn.init.zeros_(head.bias)


def layer_scales(network: Any, decay: float) -> dict[str, float]:
    """Layer-wise learning-rate decay: the factor of each trained parameter, ``decay^(L + 1 - i)``.

    Layer 0 holds what comes before the blocks, block i is layer i + 1, and the final norm and the
    classifier are layer L + 1 (Bao et al. 2022, as used by He et al. 2022). Networks other than
    ViTs have timm's layers.
    """
    groups = param_groups_layer_decay(network, layer_decay=decay)
    scales = {p: group["lr_scale"] for group in groups for p in group["params"]}
    lowest = min(scales.values())

    def scale(name: str, by_timm: float) -> float:
        if name.startswith(_TOKENS):
            return lowest
        # timm assigns the final norm of a ViT to the layer of its last block.
        return 1.0 if name.startswith("norm.") else by_timm

    return {n: scale(n, scales[p]) for n, p in network.named_parameters() if p in scales}


def undecayed(network: Any) -> frozenset[str]:
    """Names of parameters without weight decay that are not vectors."""
    by_timm = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    return frozenset(by_timm) | frozenset(_TOKENS)


def classifier_writer(
    path: Path,
    network: nn.Module,
    call: TimmCall,
    about: dict[str, Any],
    info: EncoderInfo | None = None,
) -> Callable[[], None]:
    """Copy a network's weights; returns a function that writes them to a file.

    The file has timm's keys, classifier included, and is written whole or not at all. Its metadata
    have one key, ``ssl_vit``: JSON with ``timm`` (``arch`` and ``kwargs`` of the call that builds
    it), ``about`` (statistics of the images, class names, step) and, of a plain ViT, ``info``, by
    which its file opens as an encoder.
    """
    tensors = contiguous_state(network)
    options = ((f, getattr(call, f.name)) for f in dataclasses.fields(call))
    timm_call = {f.name: value for f, value in options if value != f.default}
    content: dict[str, Any] = {"timm": timm_call, "about": about}
    if info is not None:
        content["info"] = dataclasses.asdict(info)
    return lambda: write_own(path, tensors, content)


def saved_step(path: Path) -> int | None:
    """Step at which a classifier file was written; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        return int(own_metadata(path)["about"]["step"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a classifier written by ssl_vit") from None
