"""Failures of devices and between processes: one line each, with cause and remedy."""

import pytest
import torch
import torch.distributed as dist

from ssl_vit.common.errors import RunFailed
from ssl_vit.records.recording import _error_line
from ssl_vit.training.checkpoint import Checkpoints
from ssl_vit.training.failures import cause, failure_line, lost_process
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.session import prepare_folder, train
from tests.contract import tiny

NCCL = "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {}, NCCL version 2.27.5\n"
REMOTE = NCCL.format("remote process exited or there was a network error") + (
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting.\n"
    "Last error:\nsocketProgress: Connection closed by remote peer node7<45231>"
)
OWN = NCCL.format("unhandled cuda error (run with NCCL_DEBUG=INFO for details)") + (
    "ncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure 999 'unknown error'"
)
MEMORY = NCCL.format("unhandled cuda error") + "Last error:\nCuda failure 2 'out of memory'"
CUDA = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.15 GiB of "
    "which 1.21 GiB is free. Including non-PyTorch memory, this process has 77.9 GiB memory in use."
)


def test_nccl_tells_of_another_process_by_its_last_error():
    error = dist.DistBackendError(REMOTE)
    assert lost_process(error)
    assert failure_line(error) == (
        "another process has exited or did not respond in time: socketProgress: Connection closed "
        "by remote peer node7<45231>"
    )


def test_nccl_tells_of_what_is_wrong_here():
    """That is no other process', and its first line says nothing."""
    error = dist.DistBackendError(OWN)
    assert not lost_process(error)
    line = failure_line(error)
    assert line.startswith("NCCL failed: Cuda failure 999 'unknown error'. ")
    assert "NCCL_DEBUG=INFO" in line
    assert _error_line(error) == line
    assert cause(RuntimeError(NCCL.format("invalid usage") + "Last error:\n")).startswith("NCCL")


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError(CUDA), " (1.50 GiB more were wanted)"),
        (dist.DistBackendError(MEMORY), ""),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), ""),
    ],
    ids=["torch", "NCCL", "cuBLAS"],
)
def test_out_of_memory(error, wanted):
    line = failure_line(error)
    assert line.startswith(f"out of memory{wanted}: give a smaller batch")
    assert "--optim.accumulate" in line
    assert "\n" not in line


@pytest.mark.parametrize("error", [RuntimeError("a wrong shape"), ValueError("NCCL"), KeyError()])
def test_any_other_error_keeps_its_traceback(error):
    assert failure_line(error) == ""


def test_a_step_that_does_not_fit_ends_a_run_in_a_line(tmp_path, monkeypatch):
    """Here the host has not the memory. Options that are on are not advised."""
    more = ("--run.out", str(tmp_path / "run"), "--run.activation-checkpointing")
    made = tiny.session("mae", *more)
    prepare_folder(made)
    monkeypatch.setattr(made.task, "forward", lambda *_: torch.empty(1 << 50))
    with pytest.raises(RunFailed, match=r"^step 1: out of memory \(\d+ bytes more") as failed:
        train(made)
    line = str(failed.value)
    assert line.endswith(
        "give --optim.accumulate 2 (the batch in more parts), or --run.parallel fsdp over several "
        "processes"
    )
    assert _error_line(failed.value) == line
    assert failed.value.__suppress_context__, "the traceback would keep the step's tensors"


def test_processes_meet_before_anything_is_read_from_a_device(tmp_path, monkeypatch):
    """Between a step and what reads of it: a row of the log, a checkpoint."""
    made, calls = tiny.session("mae", "--run.out", str(tmp_path / "run")), []
    prepare_folder(made)

    def note(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def noted(*args, **kwargs):
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    note(type(made.trainer), "update")
    note(type(made.parallel), "meet")
    note(RunLog, "_flush")
    note(Checkpoints, "save")
    train(made)
    steps = " ".join(calls).split("update")[1:]
    assert len(steps) == tiny.STEPS
    assert "save" in "".join(steps)
    assert all(step.split()[:2] == ["meet", "_flush"] for step in steps)
