"""Augmentation presets: options of views by the kind of image, where it is no photograph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from ssl_vit.common.checks import flag

T = TypeVar("T")
NATURAL = "natural"
# Groups of options that describe views: a method's, and those of fine-tuning.
_GROUPS = ("method", "tune")
# Together: each of the eight orientations is as likely.
_NO_UP = {"flip": 0.5, "vertical_flip": 0.5, "quarter_turns": 0.75}
_NO_COLOUR = {"jitter": 0.0, "gray": 0.0}
_PRESETS: dict[str, dict[str, float]] = {
    NATURAL: {},
    "gray": {**_NO_COLOUR, "levels": 0.8},
    "aerial": {**_NO_UP, "gray": 0.0, "solarize": 0.0, "drop_channels": 0.1},
    "microscopy": {
        **_NO_UP,
        **_NO_COLOUR,
        "solarize": 0.0,
        "channel_levels": 0.8,
        "drop_channels": 0.1,
    },
    "medical": {
        "flip": 0.0,
        "vertical_flip": 0.0,
        "quarter_turns": 0.0,
        **_NO_COLOUR,
        "solarize": 0.0,
        "blur": 0.0,
        "levels": 0.8,
        "noise": 0.1,
    },
}


def preset_values(name: str, channels: int) -> dict[str, float]:
    """Options by name that a preset sets, for images of so many channels."""
    values = _PRESETS[name]
    if name == "aerial" and channels != 3:
        return {**values, "jitter": 0.0, "levels": 0.8}
    return values


def preset_of(config: Any) -> str:
    """The preset that a command's options name; that of photographs where they have none."""
    name: str = getattr(getattr(config, "data", None), "preset", NATURAL)
    return name


def with_preset(default: T, config: Any) -> T:
    """A command's options with the values of the preset that ``config`` names, in the groups of a
    method or of fine-tuning."""
    name, channels = config.data.preset, config.data.channels
    groups = {g: getattr(default, g) for g in _GROUPS if hasattr(default, g)}
    changed = {g: _changed(own, name, channels) for g, own in groups.items()}
    return replace(default, **changed)  # type: ignore[type-var]


def _changed(options: T, name: str, channels: int) -> T:
    """A group with a preset's values, where it has options of these names; groups within it, too.
    A value stands for each of several."""
    changed: dict[str, Any] = {}
    for option, own, value in _set_by(options, name, channels):
        several = isinstance(own, tuple)
        changed[option] = value if is_dataclass(own) else (value,) * len(own) if several else value
    return replace(options, **changed)  # type: ignore[type-var]


def _set_by(options: Any, name: str, channels: int) -> Iterator[tuple[str, Any, Any]]:
    """Options that a preset sets: name, present value, and the preset's."""
    values = preset_values(name, channels)
    for field in fields(options):
        own = getattr(options, field.name)
        if is_dataclass(own):
            yield field.name, own, _changed(own, name, channels)
        elif field.name in values:
            yield field.name, own, values[field.name]


def _overridden(options: Any, name: str, channels: int) -> Iterator[str]:
    """Options that have other values than a preset gives, as on the command line."""
    for option, own, value in _set_by(options, name, channels):
        values = own if isinstance(own, tuple) else (own,)
        if is_dataclass(own):
            yield from _overridden(own, name, channels)
        elif any(v != value for v in values):
            yield f"{flag(options, option)} {' '.join(f'{v:g}' for v in values)}"


def about_preset(config: Any) -> str:
    """The preset of a command's options, and which of them differ from it."""
    name, channels = preset_of(config), config.data.channels
    groups = [getattr(config, g) for g in _GROUPS if hasattr(config, g)]
    if name != NATURAL and not any(any(_set_by(own, name, channels)) for own in groups):
        return f"{name}, which sets none of the options here"
    others = [text for own in groups for text in _overridden(own, name, channels)]
    return f"{name} but for {', '.join(others)}" if others else name
