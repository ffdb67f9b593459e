"""Renaming: state dicts under other names, without some tensors, or with some joined."""

from __future__ import annotations

import re
from collections import Counter

import torch

from ssl_vit.common.errors import check
from ssl_vit.weights.unwrapping import State

Rules = tuple[tuple[str, str], ...]


def renamed(state: State, rules: Rules, where: str) -> State:
    """Rename all keys by all rules (pattern, replacement), in order.

    Raises:
        UserError: two tensors get one name.
    """
    made = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        check(name not in made, f"{where}: {key} exists under two names")
        made[name] = tensor
    return made


def without(state: State, pattern: str) -> tuple[State, Counter[str]]:
    """Tensors whose names do not match ``pattern``, and counts of the others by regex group.

    The group is the matching parenthesis of the pattern.
    """
    groups: Counter[str] = Counter()
    kept = {}
    for key, tensor in state.items():
        found = re.match(pattern, key)
        if found:
            groups[next(group for group in found.groups() if group)] += 1
        else:
            kept[key] = tensor
    return kept, groups


def joined(state: State, rules: tuple[tuple[str, tuple[str, ...]], ...], where: str) -> State:
    """Join tensors (queries, keys and values, halves of an MLP) by rules (joined name, parts).

    Raises:
        UserError: a part is missing, or their shapes differ.
    """
    state = dict(state)
    for target, parts in rules:
        for key in [k for k in state if f".{parts[0]}." in k]:
            names = [key.replace(parts[0], part) for part in parts]
            missing = [name for name in names if name not in state]
            check(not missing, f"{where}: missing {', '.join(missing)}")
            shapes = [tuple(state[name].shape) for name in names]
            check(
                len(set(shapes)) == 1,
                f"{where}: {', '.join(names)} have shapes {shapes}; they must be equal",
            )
            state[key.replace(parts[0], target)] = torch.cat([state.pop(name) for name in names])
    return state
