"""The recorded numbers: where they are, how they are read, how close ours must be."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.conftest import SHARED

GOLDEN = Path(os.environ.get("SSL_VIT_GOLDEN", SHARED / "golden"))


def golden_files(pattern: str) -> list[Path]:
    """The recorded files; each is a test case."""
    return sorted(GOLDEN.glob(pattern))


def check_there_are(files: list[Path], pattern: str) -> None:
    """Without files the cases would vanish and nobody would know."""
    if not GOLDEN.is_dir() and "SSL_VIT_GOLDEN" not in os.environ and "CI" not in os.environ:
        pytest.skip(f"no recorded numbers at {GOLDEN}; set SSL_VIT_GOLDEN")
    assert files, f"no {pattern} in {GOLDEN}; set SSL_VIT_GOLDEN"


def read_golden(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """A file's config and its tensors."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["config"]), tensors


def close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Relative 1e-6 of the tensor's own scale, so that tiny entries do not decide."""
    assert actual.dtype == expected.dtype == torch.float64
    assert actual.shape == expected.shape, f"{name}: {actual.shape} for {expected.shape}"
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert error < 1e-6, f"{name}: relative error {error:.2e}"
