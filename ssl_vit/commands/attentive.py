"""Attentive probe command: from options to scores, card and picture."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import Any

import torch

from ssl_vit.commands.attentive_options import AttentiveConfig
from ssl_vit.commands.evaluating import Evaluation
from ssl_vit.commands.probes import Result, scores_of
from ssl_vit.common.errors import check
from ssl_vit.evaluators.attentive import AttentiveProtocol, attentive_probe
from ssl_vit.evaluators.attentive_picture import query_picture
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.online import source_targets
from ssl_vit.evaluators.scores import check_labels
from ssl_vit.evaluators.token_sets import TokenSet, read_tokens, token_reader

log = logging.getLogger("ssl_vit")


def attentive(config: AttentiveConfig) -> Result:
    """Attentive probe score, and where its query attends."""
    check(
        not config.encoder.startswith("pixels:"),
        f"--encoder is {config.encoder!r}; raw pixels have no tokens to attend to",
    )
    by = Evaluation(config)
    if by.parallel.world > 1:
        log.warning("warning: attentive is for one process; all %d do the same", by.parallel.world)
    whose = {"train": "training", "val": "validation", "held_out": "held-out"}
    sets = {
        name: FeatureSet({}, source_targets(s, f"the {whose[name]} set"), 0, torch.arange(len(s)))
        for name, s in by.sources.items()
    }
    check_labels(sets["train"], sets["val"], by.classes)
    protocol = protocol_of(config)
    reader = token_reader(by.backbone, by.machine)
    protocol.head_count(reader.width)
    tokens = read_tokens(reader, by.sources["train"], config.cache_gb)
    by.read("train", tokens.rows)
    held_out: TokenSet | None = None
    if "held_out" in by.sources:
        made = read_tokens(reader, by.sources["held_out"], config.cache_gb)
        by.read("held_out", made.rows)
        held_out = replace(made, mean=tokens.mean, std=tokens.std)
    found, val, head = attentive_probe(tokens, by.sources["val"], protocol, held_out)
    by.read("val", val)
    card = by.card("attentive", protocol={"name": protocol.name, **asdict(protocol)})
    picture = query_picture(head, tokens, by.sources["val"], val.index)
    return scores_of([found], val, by), card, by.out("attentive"), {"query": picture}


def protocol_of(config: AttentiveConfig) -> AttentiveProtocol:
    """Protocol that the options ask for."""
    own: dict[str, Any] = {"heads": config.heads, "depth": config.depth, "queries": config.queries}
    own |= {"epochs": config.epochs, "least_steps": 1} if config.epochs else {}
    own |= {"batch_size": config.probe_batch} if config.probe_batch else {}
    return AttentiveProtocol(**own, seed=config.seed)
