"""Atomic file writing: under a temporary name, synced, then renamed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: ``write`` fills a temporary file, which is renamed to ``path``.

    A process killed at any moment leaves the old file or none, never a partial one.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_folder_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a new folder atomically: ``write`` fills a temporary one, which is then renamed."""
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Sync a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network disks cannot sync folders
            raise
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Cache folder for reproducible files: $SSL_VIT_CACHE, else ~/.cache/ssl_vit."""
    return Path(os.environ.get("SSL_VIT_CACHE") or "~/.cache/ssl_vit").expanduser()
