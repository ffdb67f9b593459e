"""Atomic file writing: under a temporary name, synced, then renamed."""

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: ``write`` fills a temporary file, which is renamed to ``path``.

    A process killed at any moment leaves the old file or none, never a partial one.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        share_as_usual(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def share_as_usual(path: Path) -> None:
    """Give a file the mode that any new file has there, by the umask or the folder's default.

    safetensors (0.8) writes files that only their owner may read, whatever the umask: a run on a
    shared disk would be closed to colleagues. A folder is left as it is.
    """
    if path.is_dir():
        return
    # To ask for the umask is to set it, for all threads; a new file shows it, and its folder's ACL.
    probe = path.with_name(f"{path.name}.mode")
    probe.unlink(missing_ok=True)
    probe.touch()
    try:
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with contextlib.suppress(PermissionError):  # a disk that keeps modes of its own
            path.chmod(mode)


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
