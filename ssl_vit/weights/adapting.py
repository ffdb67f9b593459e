"""Given weights for an encoder of other image channels, another patch size, another image size."""

from __future__ import annotations

import torch
from jaxtyping import Float
from timm.layers import resample_patch_embed
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import resample_positions

# What sees the pixels: the patch projection, or a convolutional stem's first layer.
_FIRST = {"patch": "patch_embed.proj.weight", "conv": "patch_embed.backbone.0.conv.weight"}
_COLOURS = {"red": 0, "green": 1, "blue": 2}


def adapted(
    source: Encoder, target: Encoder, channels: str, where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """State of ``source.vit`` for ``target``, and what was done to it, in words.

    Fixed sine-cosine positions are those of ``target``, a formula for any size; others are
    resampled.

    Args:
        channels: how channels of images get filters (``InitConfig.channels``).

    Raises:
        UserError: it does not fit, with ``where``.
    """
    state = resample_positions(source.vit.state_dict(), source, target)
    fixed = target.config.positions == source.config.positions == "sincos"
    if fixed and not target.rotary:
        state = {**state, "pos_embed": target.vit.pos_embed}
    stem = source.config.stem
    check(
        stem == target.config.stem and (stem == "patch" or source.patch_size == target.patch_size),
        f"{where}: its stem is {stem} for patches of {source.patch_size} pixels; --encoder.stem is "
        f"{target.config.stem}, for {target.patch_size}; a stem keeps its kind, and conv its size",
    )
    first = _FIRST[stem]
    filters, notes = state[first], []
    taken = choose_filters(channels, filters.shape[1], target.channels, where)
    if taken != tuple(range(filters.shape[1])):
        filters = with_channels(filters, taken)
        notes.append(_about_channels(taken, source.channels))
    if source.patch_size != target.patch_size:
        size = [target.patch_size] * 2
        filters = resample_patch_embed(filters, size)
        notes.append(
            f"filters of {source.patch_size} pixels are resized to patches of {size[0]} by "
            "pseudo-inverse (FlexiViT)"
        )
    return {**state, first: filters}, notes


def choose_filters(how: str, given: int, wanted: int, where: str) -> tuple[int | None, ...]:
    """Filter (by number) that each of ``wanted`` channels gets of the given ones; None: their mean.

    ``mean``: given ones keep theirs and new ones get the mean; where there are fewer, all do.
    ``repeat``: the given ones over and over. Else a name for each channel.

    Raises:
        UserError: other names than ``given`` filters have, or not as many as channels.
    """
    if how in ("mean", "repeat") and given == wanted:
        return tuple(range(given))
    if how == "repeat":
        return tuple(i % given for i in range(wanted))
    if how == "mean":
        kept = given if wanted > given else 0
        return (*range(kept), *[None] * (wanted - kept))
    names = how.split(",")
    check(
        len(names) == wanted,
        f"{where}: filters {how!r} are {len(names)}; --data.channels is {wanted}",
    )
    known: dict[str, int | None] = {"mean": None} | {str(i): i for i in range(given)}
    known |= _COLOURS if given == 3 else {}
    strange = [name for name in names if name not in known]
    check(
        not strange,
        f"{where}: filters {how!r}; allowed for its {given} channels: mean or repeat, or for each "
        f"one of {', '.join(known)}",
    )
    return tuple(known[name] for name in names)


def with_channels(
    filters: Float[Tensor, "d given p q"], taken: tuple[int | None, ...]
) -> Float[Tensor, "d wanted p q"]:
    """Filters of a patch projection for other channels: those ``taken`` (None: the mean), all times
    given / wanted, so that activations keep their scale where channels are alike."""
    mean = filters.mean(1)
    chosen = [mean if i is None else filters[:, i] for i in taken]
    return torch.stack(chosen, 1) * (filters.shape[1] / len(taken))


def _about_channels(taken: tuple[int | None, ...], given: int) -> str:
    """Filters of the channels, in words; runs of the same are shortened."""
    names = list(_COLOURS) if given == 3 else [str(i) for i in range(given)]
    said = ["mean" if i is None else names[i] for i in taken]
    shown = said
    end = next((i for i in range(len(said)) if len(set(said[i:])) == 1), 0)
    if len(said) - end > 2:
        shown = [*said[:end], f"{len(said) - end} x {said[-1]}"]
    factor = f", all times {given}/{len(taken)}" if given != len(taken) else ""
    channels = "1 channel" if len(taken) == 1 else f"{len(taken)} channels"
    return f"filters of {channels}: {', '.join(shown)}{factor}"
