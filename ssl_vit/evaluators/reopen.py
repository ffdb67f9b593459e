"""Tuned networks of every kind, opened by the descriptions in their files."""

from __future__ import annotations

import importlib
from pathlib import Path

from ssl_vit.common.errors import UserError, check
from ssl_vit.evaluators.tuned import Tuned
from ssl_vit.weights.own_files import DETECTOR_FILE, MODEL_FILE, own_metadata

# Opened on demand: of a detector that is not asked for, nothing is imported.
_OPENERS = {
    "classes": ("ssl_vit.evaluators.tuned_classes", "open_classes"),
    "segment": ("ssl_vit.evaluators.tuned_pixels", "open_pixels"),
    "depth": ("ssl_vit.evaluators.tuned_pixels", "open_pixels"),
    "detect": ("ssl_vit.evaluators.tuned_detector", "open_detector"),
}
_FILES = (MODEL_FILE, DETECTOR_FILE)


def open_tuned(name: str | Path) -> Tuned:
    """Tuned network of a run folder of ``finetune`` or ``detect``, or of its file.

    Raises:
        UserError: there is none, it is of another version, or its tensors do not match.
    """
    given = Path(name).expanduser()
    files = [given / file for file in _FILES] if given.is_dir() else [given]
    path = next((file for file in files if file.is_file()), None)
    allowed = " or ".join(_FILES)
    check(path is not None, f"{str(name)!r}: no such file, nor a run folder with {allowed}")
    assert path is not None
    content = own_metadata(path)
    about = content.get("about")
    rule = "not what finetune or detect leave"
    if not isinstance(about, dict):
        raise UserError(f"{path}: {rule}; an encoder opens by load_encoder")
    kind = about.get("kind", "classes" if "timm" in content else "detect")
    known = isinstance(kind, str) and kind in _OPENERS
    check(known, f"{path}: {rule} in this version of ssl_vit: a network of {kind!r}")
    needed = {"classes": "several", "detect": "body"}.get(kind, "options")
    old = "it was left by an earlier version of ssl_vit, which did not say how it is built"
    check(needed in about, f"{path}: {old}; train it again")
    module, function = _OPENERS[kind]
    try:
        tuned: Tuned = getattr(importlib.import_module(module), function)(path, content)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        other = "metadata of another version of ssl_vit"
        raise UserError(f"{path}: {other}: {error!r:.100}") from None
    tuned.where = str(path)
    return tuned
