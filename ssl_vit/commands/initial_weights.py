"""Initial weights of a method: drawn, of a given encoder, or of a whole run; and the options that
follow from them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ssl_vit.commands.cli import layered
from ssl_vit.commands.pretrain_options import PretrainConfig, default_options
from ssl_vit.common.checks import flag
from ssl_vit.common.errors import check
from ssl_vit.common.rates import SPARING, SPARING_ADAPTERS
from ssl_vit.common.seeds import fold
from ssl_vit.methods import find_options
from ssl_vit.methods.base import Method, find_method
from ssl_vit.model.encoder import Encoder
from ssl_vit.training.run_files import CONFIG_FILE, complete
from ssl_vit.training.shards import Parts, load_parts
from ssl_vit.weights.adapting import adapted
from ssl_vit.weights.exchange import EncoderInfo, load_strictly, read_info
from ssl_vit.weights.official import open_weights
from ssl_vit.weights.own_files import ENCODER_FILE

log = logging.getLogger("ssl_vit")


def initial_method(kind: type[Method], config: PretrainConfig[Any]) -> Method:
    """Method with its initial weights, a function of the options, the seed and ``init.encoder``.

    Raises:
        UserError: the weights of ``init.encoder`` cannot be opened, or do not match.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        method = kind(config.method, config.encoder, config.data.channels)
    if config.init.encoder:
        given = open_weights(config.init.encoder, config.encoder.image_size)
        where = f"--init.encoder {config.init.encoder}"
        state, notes = adapted(given.encoder, method.encoder, config.init.channels, where)
        method.begin_with(state, where)
        if config.init.keep_near:
            method.stay_near(config.init.keep_near)
        report = "; ".join([given.report, *notes])
        log.info("initial weights from %s: %s, %s", given.path, given.format, report)
        if config.init.heads:
            _begin_with_all(method, given.path, f"{flag(config.init, 'heads')} True")
    if config.init.lora:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold(config.run.seed, config.init.lora))
            method.adapt(config.init.lora)
    return method


def _begin_with_all(method: Method, file: Path, option: str) -> None:
    """Take all weights of the run that ``file`` is the encoder of; positions are resampled.

    What the run does not have, and has begun as the encoder by now (a teacher of Gram anchoring),
    stays so.

    Raises:
        UserError: it is no run of this method, or other weights do not match.
    """
    name, folder = type(method).__module__.rpartition(".")[2], file.parent
    about = f"{option}: {folder}"
    whole = whole_method(folder) if file.name == ENCODER_FILE else None
    rule = f"is no run folder of pretrain {name} with checkpoints and {CONFIG_FILE}"
    check(whole is not None and type(whole) is type(method), f"{about} {rule}")
    assert whole is not None
    state, own = whole.for_size(method.encoder.image_size).state_dict(), method.state_dict()
    encoders = [(f"{n}.", part) for n, part in method.named_modules() if isinstance(part, Encoder)]
    begun = tuple(start for start, _ in encoders)
    kept = {n: v for n, v in own.items() if n not in state and n.startswith(begun)}
    # Sine-cosine tables are a formula for any size.
    fixed = [start for start, part in encoders if part.config.positions == "sincos"]
    kept |= {n: own[n] for n in (f"{start}vit.pos_embed" for start in fixed) if n in own}
    log.info("all weights of %s, %s", folder, load_strictly(method, state | kept, about))


def whole_method(folder: Path) -> Method | None:
    """The method of a run, from its newest whole checkpoint; None: there is no such thing.

    Raises:
        UserError: a checkpoint that does not match the run's own configuration.
    """
    found = complete(folder / "checkpoints")
    if not found or not (folder / CONFIG_FILE).is_file():
        return None
    name = read_info(folder / ENCODER_FILE).method
    own, kind = find_options(name), find_method(name)
    read = PretrainConfig[own.config]  # type: ignore[name-defined]
    default = default_options(PretrainConfig, own)
    options: PretrainConfig[Any] = layered(default, [folder / CONFIG_FILE], [], "", "", read)
    method = kind.blank(options.method, options.encoder, options.data.channels)
    if options.init.lora:
        method.adapt(options.init.lora)
    parts = Parts(sorted(found[-1].glob("task*.safetensors")))
    log.info("%s: the whole method, %s", found[-1], load_parts(method, parts))
    method.adapters = None  # what they add is in the encoder
    return method


def with_weights(
    default: PretrainConfig[Any], info: EncoderInfo, heads: bool, lora: bool = False
) -> PretrainConfig[Any]:
    """Default options for initial weights: the encoder's architecture and channels, and rates that
    spare it from new heads; ``heads``: they come with it; ``lora``: adapters are trained, which
    are small, and have the whole rate."""
    encoder = replace(info.config, drop_path=default.encoder.drop_path)
    sparing = {} if heads else SPARING_ADAPTERS if lora else SPARING
    optim = replace(default.optim, **sparing)
    data = replace(default.data, channels=info.channels)
    return replace(default, encoder=encoder, data=data, optim=optim)


def with_statistics(config: PretrainConfig[Any], info: EncoderInfo) -> PretrainConfig[Any]:
    """Options with the statistics of the initial encoder, where none are given, or wanted of the
    images, or of other channels."""
    data = config.data
    if data.mean or data.statistics == "auto" or data.channels != info.channels:
        return config
    return replace(config, data=replace(data, mean=info.mean, std=info.std))
