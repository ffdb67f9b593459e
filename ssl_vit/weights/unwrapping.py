"""Unwrapping: which of a file's dictionaries, and which part of a module, is the encoder.

Of a network and its moving average (a teacher, a momentum encoder) the average is taken, whose
features are the better ones; every choice is reported.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ssl_vit.common.errors import UserError, check

State = dict[str, Tensor]
STEMS = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
)
"""Ends of the name of a patch projection; what stands before it is the name of its network."""
_AVERAGED = ("teacher", "ema", "momentum", "target")
# Parts that wrappers (torch.compile, FSDP, activation checkpointing) put into names.
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Unwrapped:
    """Tensors of a file.

    ``wrapper``: the key they were under, or ""; ``chosen``: which was taken of several; ``options``
    of the training, where the file has them; ``arch``: the name of its network, by its own account.
    """

    wrapper: str
    state: State
    chosen: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    arch: str = ""


def unwrapped(content: Any, where: str) -> Unwrapped:
    """Unwrap the tensors of a file; the prefix ``module.``, and names of wrappers, are removed.

    Raises:
        UserError: it contains no named tensors, or those of a network in flat parts.
    """
    wrapper, chosen, state = "", "", content
    if isinstance(content, dict) and not _is_state(content):
        found = {str(k): v for k, v in content.items() if _is_state(v)}
        networks = [k for k, v in found.items() if any(name.endswith(STEMS) for name in v)]
        wrapper, chosen = _choice(networks or list(found))
        state = found.get(wrapper, content)
    if not _is_state(state):
        raise UserError(f"{where}: no weights: {_contents(content)}")
    state = {_WRAPPERS.sub("", k): v for k, v in state.items()}
    if all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    flat = next((k for k in state if k.endswith("flat_param")), "")
    check(
        not flat,
        f"{where}: one process's part of a network that FSDP has made flat ({flat}); DINOv2 writes "
        "the whole teacher to eval/training_N/teacher_checkpoint.pth of the same run: give that",
    )
    about = content if isinstance(content, dict) else {}
    options = about.get("args")
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    arch = about.get("arch") if isinstance(about.get("arch"), str) else ""
    return Unwrapped(
        wrapper, state, chosen, options if isinstance(options, dict) else {}, str(arch)
    )


def network(state: State, where: str) -> tuple[State, Counter[str], str]:
    """The encoder among the parts of a module, as of Lightning: its tensors, without their prefix.

    Also counts of the other tensors by the part they belong to, and which was chosen of several.
    """
    found = [k.removesuffix(stem) for stem in STEMS for k in state if k.endswith(stem)]
    prefixes = sorted({p for p in found if p == "" or p.endswith(".")}, key=found.index)
    if not prefixes or "" in prefixes:
        return state, Counter(), ""
    name, chosen = _choice([p.removesuffix(".") for p in prefixes])
    prefix = f"{name}."
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    others = (k for k in state if not k.startswith(prefix))
    return own, Counter(_part(k, prefix) for k in others), chosen


def _part(key: str, prefix: str) -> str:
    """Name of a tensor's part beside a network: up to the first word that differs."""
    words, own = key.split("."), prefix.split(".")
    same = next(i for i, word in enumerate(words) if word != own[i])
    return ".".join(words[: same + 1])


def _choice(names: Iterable[str]) -> tuple[str, str]:
    """Name to take of several, and a note on the choice; of one there is no note."""
    every = list(names)
    if len(every) < 2:
        return (every[0] if every else ""), ""

    def rank(name: str) -> tuple[int, int]:
        words = re.split(r"[._]", name)
        averaged = [i for i, word in enumerate(_AVERAGED) if word in words]
        return min(averaged, default=len(_AVERAGED)), len(words)

    chosen = min(every, key=rank)
    others = ", ".join(name for name in every if name != chosen)
    return chosen, f"{chosen} is taken, not {others}"


def _is_state(content: Any) -> bool:
    """True for a dictionary of named tensors."""
    whole = isinstance(content, dict) and len(content) > 0
    return whole and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def _contents(content: Any) -> str:
    """Contents of a file that has no weights."""
    text = "not a dictionary of named tensors"
    if not isinstance(content, dict) or not content:
        return text
    if {"state", "param_groups"} <= content.keys():
        return f"{text} but the state of an optimizer alone"
    return f"{text}, with keys {', '.join(map(str, list(content)[:5]))}"
