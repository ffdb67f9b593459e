"""Shapes in signatures are checked in every test: jaxtyping's annotations, by beartype."""

import os

# Several test processes share the cores: threads of one would wait for those of another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

install_import_hook("ssl_vit", "beartype.beartype")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("SSL_VIT_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the project; tests that need it are skipped without it."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set SSL_VIT_SHARED")
    return folder
