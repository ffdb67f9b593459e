"""Packages that the proof on a device needs, and how to carry them to a machine without a network.

Only the standard library is imported: any of the packages may be missing.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

# Modules by the name of the package that brings them; those that tyro needs are its own.
NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "einops": "einops",
    "numpy": "numpy",
    "pillow": "PIL",
    "tifffile": "tifffile",
    "tensorboard": "tensorboard",
    "tyro": "tyro",
    "docstring-parser": "docstring_parser",
    "typeguard": "typeguard",
    "pyyaml": "yaml",
    "safetensors": "safetensors",
    "scikit-learn": "sklearn",
    "rich": "rich",
    "jaxtyping": "jaxtyping",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
    "nvidia-ml-py": "pynvml",
    "pytest": "pytest",
    "beartype": "beartype",
}
# Packages of the project that no part of the proof imports.
UNUSED = ("altair", "imagecodecs", "submitit", "vl-convert-python")


def missing() -> list[str]:
    """Packages that are not installed here."""
    return [package for package, module in NEEDED.items() if find_spec(module) is None]


def remedy(packages: list[str]) -> str:
    """Commands that bring packages, for this Python, where there is a network and where not."""
    python, names = f"{sys.version_info.major}.{sys.version_info.minor}", " ".join(packages)
    return (
        "with a network: python3 -m pip install -e '.[test]'; without one, where there is one: "
        f"python3 -m pip download -d wheels --only-binary=:all: --python-version {python} {names}; "
        f"and here: python3 -m pip install --no-index --find-links wheels {names}"
    )


def refuse_missing() -> None:
    """Exit with one line and status 2 if a package is missing."""
    if packages := missing():
        lacks = f"not installed: {', '.join(packages)}"
        print(f"error: {lacks}; {remedy(packages)}", file=sys.stderr)
        raise SystemExit(2)
