"""Description of views: what is done to crops, and what may be too much for images."""

from collections.abc import Callable

from ssl_vit.data.augment import Crop, ViewSpec

# Brightness of colour jitter that moves images by more deviations than this leaves little of them.
_FAR = 3.0


def _of(part: str, name: str) -> Callable[[Crop], float]:
    def value(crop: Crop) -> float:
        whose = getattr(crop, part) if part else crop
        return 0.0 if whose is None else float(getattr(whose, name))

    return value


_OPERATIONS: dict[str, Callable[[Crop], float]] = {
    "flip": _of("", "flip"),
    "vertical flip": _of("", "vertical_flip"),
    "quarter turns": _of("", "quarter_turns"),
    "colour jitter": _of("photometric", "jitter"),
    "gray": _of("photometric", "gray"),
    "blur": _of("photometric", "blur"),
    "solarise": _of("photometric", "solarize"),
    "levels": _of("levels", "together"),
    "levels of each channel": _of("levels", "each"),
    "channels dropped": _of("levels", "drop"),
    "noise up to": _of("levels", "noise"),
}


def described(spec: ViewSpec) -> str:
    """Description of the augmentations of crops, with their probabilities, in a line; for each kind
    where kinds differ."""
    found = []
    for name, value in _OPERATIONS.items():
        values = [f"{value(crop):g}" for crop in spec.crops]
        shown = values[:1] if len(set(values)) == 1 else values
        if shown != ["0"]:
            found.append(f"{name} {' / '.join(shown)}")
    return ", ".join(found) or "crops alone"


def far_from_black(spec: ViewSpec, mean: tuple[float, ...], std: tuple[float, ...]) -> list[str]:
    """A warning where colour jitter, which scales values about 0, moves images too far."""
    jittered = [c.photometric for c in spec.crops if c.photometric and c.photometric.jitter]
    most = max((p.brightness for p in jittered), default=0.0)
    moved = most * max(abs(m) / s for m, s in zip(mean, std, strict=True))
    if moved <= _FAR:
        return []
    return [
        f"colour jitter scales values about 0, by up to {100 * most:.0f} %, which moves these "
        f"images by up to {moved:.3g} deviations: give --method.jitter 0, or a --data.preset "
        "without it, whose levels move them by half a deviation"
    ]
