"""Joules, from counters that are files here: those that Linux shows of processors."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from ssl_vit.training.energy import Energy

CPU = torch.device("cpu")


def zone(folder, name, microjoules, limit=1_000_000_000):
    path = folder / name
    path.mkdir()
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{limit}\n")
    return path / "energy_uj"


def test_no_counter_is_no_number(tmp_path):
    assert math.isnan(Energy(CPU, tmp_path).take())
    assert math.isnan(Energy(CPU, tmp_path / "none").take())


def test_packages_are_added_and_their_parts_are_not(tmp_path):
    one, two = zone(tmp_path, "intel-rapl:0", 5_000_000), zone(tmp_path, "intel-rapl:1", 0)
    part = zone(tmp_path, "intel-rapl:0:0", 0)
    energy = Energy(CPU, tmp_path)
    for file, microjoules in ((one, 7_000_000), (two, 500_000), (part, 9_000_000)):
        file.write_text(str(microjoules))
    assert energy.take() == pytest.approx(2.5)
    assert energy.take() == 0


def test_a_counter_begins_anew(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", 900_000, limit=1_000_000)
    energy = Energy(CPU, tmp_path)
    file.write_text("100000")
    assert energy.take() == pytest.approx(0.2)
    file.write_text("50000")
    assert energy.take() == pytest.approx(0.95)


def test_a_counter_that_may_not_be_read_is_left_out(tmp_path):
    zone(tmp_path, "intel-rapl:0", 0)
    (tmp_path / "intel-rapl:1").mkdir()  # as for users who may not: no file can be opened
    file = tmp_path / "intel-rapl:0" / "energy_uj"
    energy = Energy(CPU, tmp_path)
    file.write_text("3000000")
    assert energy.take() == pytest.approx(3)


def test_only_one_process_of_a_machine_counts_the_processors(tmp_path, monkeypatch):
    zone(tmp_path, "intel-rapl:0", 0)
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "12345")
    assert Energy(CPU, tmp_path).take() == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert math.isnan(Energy(torch.device("cuda", 1), tmp_path).take())


def test_a_counter_that_is_lost_on_the_way_ends_nothing(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", 0)
    energy = Energy(CPU, tmp_path)
    file.write_text("2000000")
    assert energy.take() == pytest.approx(2)
    file.unlink()
    assert math.isnan(energy.take())
    file.write_text("9000000")
    assert math.isnan(energy.take())


def test_the_millijoules_of_a_gpu(tmp_path, monkeypatch):
    """NVML's calls as its reference has them; no GPU is needed to count."""
    counted = iter([1_000.0, 1_000.0, 4_500.0])
    asked = []
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: asked.append(name) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counted),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    properties = SimpleNamespace(uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    energy = Energy(torch.device("cuda", 0), tmp_path)
    assert energy.take() == pytest.approx(3.5)
    assert asked == ["GPU-12-34"]


def test_a_gpu_that_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert math.isnan(Energy(torch.device("cuda", 0), tmp_path).take())
