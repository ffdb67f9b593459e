"""What a process sets up for a CUDA device, in which order; no device is there."""

import ctypes
import sys

import pytest
import torch
import torch.distributed as dist

from ssl_vit.commands.gallery import prepare
from ssl_vit.commands.picture_options import PictureConfig
from ssl_vit.training.parallel import Parallel, reuse_memory, start_parallel
from tests.contract import tiny

WORLD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
ADDRESS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture
def calls(monkeypatch):
    """Calls of the driver and of the process group, in turn; torch's settings are put back."""
    made: list[tuple[str, object]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(("device", device)))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **_: made.append(("group", backend))
    )
    for name, value in (WORLD | ADDRESS).items():
        monkeypatch.setenv(name, value)
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.allow_tf32
    yield made
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_the_device_is_set_before_the_process_group(calls):
    parallel = start_parallel("cuda")
    assert parallel.device == torch.device("cuda", 1)
    assert calls == [("device", torch.device("cuda", 1)), ("group", "cpu:gloo,cuda:nccl")]
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cudnn.allow_tf32
    assert Parallel(0, 1, parallel.device).watchdog(1.0).ends


def test_a_cpu_has_none_of_it(calls):
    torch.backends.cuda.enable_cudnn_sdp(True)
    parallel = start_parallel("cpu")
    assert calls == [("group", "gloo")]
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert not Parallel(0, 1, parallel.device).watchdog(1.0).ends


def test_pictures_set_it_up_too(calls):
    torch.backends.cudnn.allow_tf32 = True
    encoder = str(tiny.encoder_file())
    scene = prepare(PictureConfig(encoder=encoder, images=("digits:val",), device="cuda:1"), 2)
    assert calls == [("device", scene.device)]
    assert not torch.backends.cudnn.allow_tf32


class OldLibrary:
    """glibc before it allowed more than 32 MiB: it can hardly be had where torch runs in tests."""

    def __init__(self, largest: int) -> None:
        self.largest, self.set = largest, dict[int, int]()

    def mallopt(self, name: int, value: int) -> int:
        if name == -3 and value > self.largest:
            return 0
        self.set[name] = value
        return 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
@pytest.mark.parametrize(("largest", "mapped"), [(1 << 40, 1 << 30), (1 << 25, 1 << 25), (0, None)])
def test_memory_is_reused_as_far_as_the_c_library_allows(largest, mapped, monkeypatch):
    """What is not allowed leaves all as it is: the second setting alone ends its default."""
    library = OldLibrary(largest)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    reuse_memory(torch.device("cpu"))
    assert library.set == ({-3: mapped, -1: (1 << 31) - 1} if mapped else {})
    library.set.clear()
    reuse_memory(torch.device("cuda", 0))
    assert not library.set
