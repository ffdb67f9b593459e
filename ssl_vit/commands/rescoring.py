"""Scores of a tuned network from its file, as its card says or of other images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ssl_vit.commands.detect_options import DetectConfig
from ssl_vit.commands.evaluating import warn_same_images, with_labels
from ssl_vit.commands.tuning import save_pictures, show_scores
from ssl_vit.common.errors import RunFailed, UserError, check
from ssl_vit.common.layers import COMMAND_LINE, known_keys, parse, tree_flags
from ssl_vit.data.sources import Source, open_source, split_holdout
from ssl_vit.data.statistics import survey
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.options import FinetuneConfig
from ssl_vit.evaluators.protocol import check_same, versions, write_card
from ssl_vit.evaluators.reopen import open_tuned
from ssl_vit.evaluators.score import Score
from ssl_vit.evaluators.tuned import Tuned, val_card
from ssl_vit.training.parallel import resolve_precision, start_parallel
from ssl_vit.weights.exchange import sha256

log = logging.getLogger("ssl_vit")
_PROG = "python -m ssl_vit.evaluate again"
TUNED: dict[str, Any] = {"finetune": FinetuneConfig, "detect": DetectConfig}
"""Evaluators that leave a network, and their options."""
# Options of a score, which change nothing of the network.
_SCORING = (
    *("--run.out", "--run.device", "--run.precision", "--depth.scale", "--depth.crop"),
    *("--segment.scales", "--segment.overlap", "--segment.flip", "--segment.ignore"),
)
_OF_KINDS = ("--depth.", "--segment.")


def again_tuned(path: str, card: dict[str, Any], flags: Sequence[str]) -> int:
    """Score the network of a card again; 0 if the scores are those of the card, or of other images,
    or by other options.

    Args:
        flags: options of the score, in place of those of the card. With ``--run.out`` the new card
            and the pictures are written there.

    Raises:
        UserError: an option that is not one of a score, or images that it cannot be scored on.
        RunFailed: the same images and other numbers, or without ``flags`` anything else.
    """
    config, folder = options_of(path, card, flags)
    file = model_of(path, card)
    tuned = open_tuned(file)
    idle = [f for f in flags if f.startswith(_OF_KINDS) and not f.startswith(f"--{tuned.kind}.")]
    check(not idle, f"{file} is a network of {tuned.kind}: {' '.join(idle)} has no effect")
    tuned.score_by(config)
    parallel = start_parallel(config.run.device)
    if parallel.world > 1:
        log.warning("warning: again is for one process; all %d do the same", parallel.world)
    precision = resolve_precision(config.run.precision, parallel.device)
    machine = Machine(parallel.device, precision, config.data.workers, tuned.at_once)
    val = scored_images(config, tuned)
    judged = tuned.judge(val, machine, config.run.seed)
    now = card | judged.about | machine.card() | {"versions": versions(tuned.packages)}
    now |= {"val": val_card(tuned, judged, val, None), "options": asdict(config)}
    now["model"] = card["model"] | {"file": str(file), "sha256": sha256(file)}
    if parallel.main:
        show_scores(config.encoder, tuned, judged.scores, now)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save_pictures(folder, judged.pictures)
            write_card(folder / Path(path).name, now, judged.scores)
            print(f"protocol and scores: {folder / Path(path).name}")
    warn_same_images(card["train"]["content_sha256"], now["val"]["content_sha256"])
    said = compared(path, card, now, judged.scores, config if flags else None)
    if parallel.main:
        print(said)
    return 0


def compared(
    path: str, card: dict[str, Any], now: dict[str, Any], scores: list[Score], config: Any
) -> str:
    """Comparison of scores with those of a card, in words; ``config``: options that were given,
    None if none were.

    Raises:
        RunFailed: they should be those of the card, and are not.
    """
    if config is not None:
        asked = options_of(path, card, ())[0]
        hashes = [name for name in now["val"] if name.endswith("sha256")]
        if any(now["val"][name] != card["val"].get(name) for name in hashes):
            return f"of other images than in {path}"
        if replace(config, run=asked.run, data=asked.data) != asked:
            return f"scored by other options than in {path}"
    check_same(path, card, now, scores)
    return f"the scores are the same as in {path}"


def options_of(path: str, card: dict[str, Any], flags: Sequence[str]) -> tuple[Any, Path | None]:
    """Options of a card, with ``flags`` over them; and the folder to write to, None if none.

    Raises:
        UserError: a flag is no option of a score.
    """
    names = check_flags(flags)
    kind = TUNED[card["evaluator"]]
    config = parse(kind(), tree_flags(card["options"], known_keys(kind()), path), path, _PROG)
    trained = Path(config.run.out).expanduser()
    config = parse(config, flags, COMMAND_LINE, _PROG)
    if "--run.out" not in names:
        return config, None
    folder = Path(config.run.out).expanduser()
    own = (trained.resolve(), Path(path).expanduser().resolve().parent)
    check(folder.resolve() not in own, f"--run.out is {str(folder)!r}, the run's own: give another")
    return config, folder


def check_flags(flags: Sequence[str]) -> list[str]:
    """Names of the options given.

    Raises:
        UserError: one of them is no option of a score.
    """
    names = [flag.partition("=")[0] for flag in flags if flag.startswith("--")]
    strange = [n for n in names if n not in _SCORING and not n.startswith("--data.")]
    allowed = f"allowed are --data.val and its like, {', '.join(_SCORING)}"
    check(not strange, f"again trains nothing: {' '.join(strange)} has no effect; {allowed}")
    check(not flags or flags[0].startswith("--"), f"usage: {_PROG} CARD.json [options]")
    return names


def model_of(path: str, card: dict[str, Any]) -> Path:
    """File of a card's network: beside the card or, where a card was moved, as it says.

    Raises:
        UserError: there is none.
        RunFailed: it is another one.
    """
    try:
        given, digest = Path(card["model"]["file"]), card["model"]["sha256"]
    except (KeyError, TypeError):
        raise UserError(f"{path} does not say which file its network is in") from None
    places = (Path(path).expanduser().parent / given.name, given.expanduser())
    file = next((place for place in places if place.is_file()), None)
    check(file is not None, f"{path} is of {given}, which is neither there nor beside the card")
    assert file is not None
    if (found := sha256(file)) != digest:
        raise RunFailed(f"model sha256 was {digest} in {path}, and is {found} now, of {file}")
    return file


def scored_images(config: Any, tuned: Tuned) -> Source:
    """Validation images of a run, or those that it held out of its training images.

    Raises:
        UserError: none is held out, none can be read, or the network cannot be scored on them.
    """
    data = replace(config.data, channels=tuned.view.channels)
    if data.val:
        source = open_source(data.val, data)
    else:
        train = open_source(data.train, data, weighted=True)
        source = split_holdout(train, data.holdout, config.run.seed)[1]
        check(len(source) > 0, f"{data.train} holds no image out: give --data.val")
    survey(source, tuned.view.channels, config.run.seed, 1).check(tuned.where)
    source = with_labels(source, "--data.val") if tuned.labelled else source
    return tuned.matched(source)
