"""Failures of devices and of the connection between processes: cause and remedy in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ssl_vit.common.config import OptimConfig, RunConfig
from ssl_vit.common.errors import RunFailed

_BETWEEN = ("gloo", "Connection closed by peer", "Connection reset", "Socket", "TCPStore")
# Of NCCL's errors those that another process causes; all others are this machine's own.
_GONE = ("ncclRemoteError", "remote process", "onnection", "timeout", "timed out", "Broken pipe")
_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_SMALLER = (
    "give a smaller batch (--batch-size) or, in training, --optim.accumulate, "
    "--run.activation-checkpointing, or --run.parallel fsdp over several processes"
)


def failure_line(error: BaseException) -> str:
    """Cause of such a failure, and what to do, in one line; empty for any other error."""
    if isinstance(error, RunFailed):  # which is a line already
        return ""
    if lacks_memory(error):
        return f"{_memory(error)}: {_SMALLER}"
    if lost_process(error):
        return f"another process has exited or did not respond in time: {cause(error)}"
    if isinstance(error, RuntimeError) and "NCCL" in str(error):
        return f"NCCL failed: {cause(error)}. NCCL_DEBUG=INFO in the environment shows more"
    return ""


def lost_process(error: BaseException) -> bool:
    """True if an error indicates that another process has exited or did not respond in time."""
    message = str(error)
    if isinstance(error, RuntimeError) and "NCCL" in message:
        return any(sign in message for sign in _GONE)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in message for sign in _BETWEEN)
    )


def lacks_memory(error: BaseException) -> bool:
    """True if a device, or the host in its place, had not the memory for a tensor."""
    known = isinstance(error, torch.OutOfMemoryError)
    return known or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _MEMORY)
    )


def cause(error: BaseException) -> str:
    """Cause of an error: its first line or, of NCCL, what follows "Last error:", if anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = next((i for i, line in enumerate(lines) if line.startswith("Last error:")), None)
    if last is None:
        return lines[0] if lines else type(error).__name__
    text = " ".join([lines[last].removeprefix("Last error:").strip(), *lines[last + 1 :]]).strip()
    return text or lines[0]


@contextmanager
def memory_of_a_step(run: RunConfig, optim: OptimConfig, step: int) -> Iterator[None]:
    """Context of a training step: a lack of memory ends the run in one line, with the options that
    need less.

    Raises:
        RunFailed: the device has not the memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        less = [f"--optim.accumulate {2 * optim.accumulate} (the batch in more parts)"]
        if not run.activation_checkpointing:
            less.append("--run.activation-checkpointing")
        if run.parallel != "fsdp":
            less.append("--run.parallel fsdp over several processes")
        raise RunFailed(f"step {step + 1}: {_memory(error)}; give {', or '.join(less)}") from None


def _memory(error: BaseException) -> str:
    """Memory that was lacking, in words."""
    asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    return "out of memory" + (f" ({asked[1]} more were wanted)" if asked else "")
