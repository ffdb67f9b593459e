"""A step without numbers: on the meta device, and counted by benchmark scale."""

import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch

from ssl_vit import benchmark
from ssl_vit.benchmarks.costs import count_step
from ssl_vit.commands import scale
from ssl_vit.common.errors import RunFailed
from ssl_vit.common.task import Views
from ssl_vit.methods.base import Method
from ssl_vit.model.architecture import without_memory
from tests.contract import tiny


def weightless(kind: type[Method], name: str, *more: str) -> Method:
    """The method without memory."""
    config = tiny.options(name, *more)[1]
    with without_memory():
        return kind(config.method, config.encoder, 1)


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The meta device, which autocast does not know."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    return torch.device("meta")


@pytest.mark.parametrize("holes", [False, True])
def test_a_whole_step_runs_on_the_meta_device(name, kind, meta, holes):
    """With all that is called around the update: nothing reads a number from the device, nor where
    pixels are missing."""
    task = weightless(kind, name).train()
    task.set_length(tiny.STEPS, 2)
    views = tiny.first_views(tiny.session(name))
    missing = [crop > 1 for crop in views.crops] if holes else []
    views = dataclasses.replace(views, missing=missing).to(meta)
    for step in range(2):
        scalars = task(views, step)
        scalars["loss"].backward()
        task.before_update(step)
        task.after_update(step, torch.ones((), dtype=torch.bool, device=meta))
    assert all(value.device.type == "meta" for value in scalars.values())


def test_the_scale_of_its_paper_is_counted(name, monkeypatch, tmp_path, capsys):
    """With the options it has by default, by the door."""
    monkeypatch.setattr(scale, "recipes", dict)
    out = tmp_path / "scale.json"
    sizes = ("--archs", "test_vit", "--image-sizes", "--devices", "2", "--out", str(out))
    assert benchmark.main(["scale", name, *tiny.given_encoders(name), *sizes]) == 0
    report = json.loads(out.read_text())
    for row in report["sizes"]:
        assert row["flop_per_image"] > 0
        assert row["largest_batch"]["kept"]["1"] > 0
        kept, recomputed = (row["activations"][how] for how in ("kept", "recomputed"))
        assert 0 < recomputed["per_image"] <= kept["per_image"]
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_a_step_that_reads_the_device_is_refused_in_a_sentence(name, kind):
    class Reading(kind):
        def forward(self, views: Views, step: int) -> dict[str, torch.Tensor]:
            scalars = super().forward(views, step)
            return scalars if scalars["loss"].item() else {}

    task = weightless(Reading, name)
    with pytest.raises(RunFailed, match="Reading reads numbers from the device") as refused:
        count_step(task, kind.view_spec(task.config, task.encoder), 1)
    assert "\n" not in str(refused.value)
