"""Checkpoints: whole or absent, written behind the training's back, by parts."""

import json
import logging
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.common.distributed import rows_of
from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.training import checkpoint
from ssl_vit.training.checkpoint import Checkpoints, clean, load_checkpoint
from ssl_vit.training.parallel import Parallel
from ssl_vit.training.run_files import complete
from ssl_vit.training.shards import Parts, blank_copy, own_part

ALONE = Parallel(0, 1, torch.device("cpu"))


class Net(nn.Module):
    """Weights of several shapes, one frozen, a scalar, and buffers that are no floats."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(3, 5)
        self.scale = nn.Parameter(torch.randn(()))
        self.frozen = nn.Parameter(torch.randn(2, 2), requires_grad=False)
        self.register_buffer("count", torch.tensor([seed, 7]))


def stepped(seed: int = 0) -> tuple[Net, AdamW]:
    """A network and its optimizer after a step."""
    net = Net(seed)
    optimizer = AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, fused=True)
    (net.linear(torch.ones(2, 3)).square().sum() * net.scale).backward()
    optimizer.step()
    return net, optimizer


def saved(folder: Path, *steps: int, keep: int = 9, keep_every: int = 0) -> tuple[Net, AdamW]:
    """Checkpoints of these steps, of one state."""
    net, optimizer = stepped()
    checkpoints = Checkpoints(folder, keep, keep_every, ALONE)
    for step in steps:
        checkpoints.save(step, net, optimizer, {"n": 10}, extra={"seen": torch.tensor(3.5)})
    checkpoints.finish()
    return net, optimizer


def names(folder: Path) -> list[int]:
    return [int(p.name.removeprefix("step-")) for p in complete(folder)]


def test_what_is_saved_comes_back(tmp_path):
    net, optimizer = saved(tmp_path, 7)
    other, extra = Net(seed=1), {"seen": torch.tensor(0.0)}
    fresh = AdamW([p for p in other.parameters() if p.requires_grad], lr=0.1, fused=True)
    state = load_checkpoint(complete(tmp_path)[0], other, fresh, extra)
    assert (state["step"], state["images"]) == (7, {"n": 10})
    assert extra["seen"] == 3.5
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    pairs = zip(optimizer.param_groups[0]["params"], fresh.param_groups[0]["params"], strict=True)
    for a, b in pairs:
        assert optimizer.state[a].keys() == fresh.state[b].keys()
        for key, value in optimizer.state[a].items():
            assert torch.equal(fresh.state[b][key], value), key


def test_the_newest_and_every_nth_stay(tmp_path):
    saved(tmp_path, *range(1, 11), keep=2, keep_every=4)
    assert names(tmp_path) == [4, 8, 9, 10]
    assert sorted(p.name for p in tmp_path.iterdir()) == [p.name for p in complete(tmp_path)]


def test_training_goes_on_while_it_is_written(tmp_path, monkeypatch):
    """What is written is the state when it was saved; the next save waits for it."""
    open_, real = threading.Event(), checkpoint.save_file

    def slow(*arguments):
        assert open_.wait(30)
        real(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    net, optimizer = stepped()
    before = net.linear.weight.detach().clone()
    checkpoints = Checkpoints(tmp_path, 9, 0, ALONE)
    checkpoints.save(1, net, optimizer, {})
    with torch.no_grad():
        net.linear.weight.zero_()
    assert checkpoints.state() == (False, True)
    checkpoints.go_on(*checkpoints.state())
    assert names(tmp_path) == []
    second = threading.Thread(target=checkpoints.save, args=(2, net, optimizer, {}))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "two at a time"
    open_.set()
    second.join(30)
    assert names(tmp_path) == [1]
    checkpoints.finish()
    assert names(tmp_path) == [1, 2]
    first, last = (load_file(path / "task.safetensors") for path in complete(tmp_path))
    assert torch.equal(first["linear.weight"], before)
    assert not last["linear.weight"].any()


def test_a_disk_that_takes_no_more(tmp_path, monkeypatch):
    """One clear error, at the next step; the one before is whole, of this one nothing is left."""
    net, optimizer = saved(tmp_path, 1)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    checkpoints = Checkpoints(tmp_path, 9, 0, ALONE)
    checkpoints.save(2, net, optimizer, {})
    with pytest.raises(
        RunFailed, match=r"step-00000002 cannot be written: .*No space left"
    ) as told:
        checkpoints.finish()
    assert told.value.everywhere
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_files_that_other_machines_wrote_are_waited_for(tmp_path):
    """They may be seen late; never seen, they are on another disk."""
    late = tmp_path / "late"
    writer = threading.Timer(0.3, lambda: late.write_bytes(b"four"))
    writer.start()
    assert checkpoint._size(late) == 4
    writer.join()
    with pytest.raises(OSError, match="must be on a disk all nodes share"):
        checkpoint._size(tmp_path / "never", patience=0.0)


def test_any_error_is_a_failed_save(tmp_path, monkeypatch):
    """Not the disk's alone, and also after the files are written."""
    net, optimizer = saved(tmp_path, 1)

    def strange(*arguments):
        raise ValueError("of another kind")

    monkeypatch.setattr(checkpoint, "write_text_atomically", strange)
    checkpoints = Checkpoints(tmp_path, 9, 0, ALONE)
    checkpoints.save(2, net, optimizer, {})
    with pytest.raises(RunFailed, match="of another kind"):
        checkpoints.finish()
    assert names(tmp_path) == [1]


def test_a_failure_between_two_looks_is_not_a_success(tmp_path):
    """The thread fails and ends after it was seen alive: then it is busy, and failed next time."""
    checkpoints = Checkpoints(tmp_path, 9, 0, ALONE)
    save = checkpoint._Save(tmp_path / "a", tmp_path / "b", {})

    class Ends:
        def is_alive(self) -> bool:
            save.error = "it failed just now"
            return False

    save.work, checkpoints.under_way = Ends(), save
    assert checkpoints.state() == (True, False)


def test_what_cannot_be_removed_is_said_and_left(tmp_path, monkeypatch, caplog):
    def busy(*arguments, **options):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    with caplog.at_level(logging.WARNING, logger="ssl_vit"):
        saved(tmp_path, 1, 2, 3, keep=2)
        clean(tmp_path)
    assert names(tmp_path) == [2, 3]
    assert ".step-00000001.partial cannot be removed" in caplog.text


def test_folders_of_other_names_are_nobodys_business(tmp_path):
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001-good")
    saved(tmp_path, 2, 3, keep=1)
    assert names(tmp_path) == [3]
    assert (tmp_path / "step-00000001-good").is_dir()


@pytest.mark.parametrize("how", ["cut", "lost", "unnamed"])
def test_what_is_not_whole_does_not_count(tmp_path, caplog, how):
    saved(tmp_path, 1, 2)
    broken = tmp_path / "step-00000002"
    if how == "cut":
        file = broken / "task.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "lost":
        (broken / "optimizer.safetensors").unlink()
    else:
        (broken / "state.json").unlink()
    assert names(tmp_path) == [1]
    with caplog.at_level(logging.WARNING, logger="ssl_vit"):
        clean(tmp_path)
    assert "step-00000002 lacks some of its files" in caplog.text
    with pytest.raises(UserError, match=r"step-00000002 (lacks some|is not a checkpoint folder)"):
        load_checkpoint(broken, *stepped())
    saved(tmp_path, 2)  # a run that comes there again replaces it
    assert names(tmp_path) == [1, 2]


def test_a_damaged_state_is_said(tmp_path):
    saved(tmp_path, 1)
    state = tmp_path / "step-00000001" / "state.json"
    for content in ("", "[]", "{}", '{"step": 1, "world": "many"}', '{"step": 1, "world": 0}'):
        state.write_text(content)
        with pytest.raises(UserError, match=r"state.json is damaged"):
            load_checkpoint(state.parent, *stepped())


def test_another_networks_state_is_refused(tmp_path):
    saved(tmp_path, 1)
    other = nn.Linear(3, 5)
    with pytest.raises(UserError, match="tensors match"):
        load_checkpoint(complete(tmp_path)[0], other, AdamW(other.parameters(), fused=True))


@pytest.mark.parametrize("n", [0, 1, 5, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_rows_are_those_of_chunk(n, world):
    """As FSDP2 shards: torch.chunk, and nothing for processes beyond its chunks."""
    rows = torch.arange(n)
    chunks = [c.tolist() for c in rows.chunk(world)] if n else []
    chunks += [[]] * (world - len(chunks))
    assert [rows[rows_of(n, r, world)].tolist() for r in range(world)] == chunks


@pytest.mark.parametrize("world", [1, 2, 4])
def test_parts_put_together(tmp_path, world):
    """Whole tensors and any rows of them, from the files of any number of processes."""
    state = {
        "a": torch.randn(5, 3),
        "b": torch.randn(1, 2),
        "c": torch.tensor(4),
        "d": torch.ones(2),
    }
    for rank in range(world):
        save_file(own_part(state, {"d"}, rank, world), tmp_path / str(rank))
    parts = Parts([tmp_path / str(rank) for rank in range(world)])
    assert parts.names == sorted(state)
    for name, value in state.items():
        assert parts.shape(name) == value.shape
        assert torch.equal(parts.read(name), value)
    for start in range(6):
        for stop in range(start, 6):
            assert torch.equal(parts.read("a", slice(start, stop)), state["a"][start:stop])


def test_scalars_leave_the_device_together():
    """One copy of each kind: AdamW has a count of steps of each parameter. Tensors are fake."""
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                copies.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    with FakeTensorMode():
        state = {f"{i}::step": torch.zeros((), device="cuda") for i in range(50)}
        state |= {"a": torch.ones(4, 3, device="cuda"), "n": torch.ones((), device="cuda").int()}
        copies.clear()
        with Copies():
            found = own_part(state, set(), 0, 1)
    assert sorted(copies) == [(1,), (4, 3), (50,)]
    assert {value.device.type for value in found.values()} == {"cpu"}
    assert {name: v.shape for name, v in found.items()} == {n: v.shape for n, v in state.items()}


def test_a_blank_copy_has_no_weights_of_its_own():
    net = Net()
    blank = blank_copy(net)
    assert all(p.is_meta for p in blank.parameters())
    assert [p.requires_grad for p in blank.parameters()] == [
        p.requires_grad for p in net.parameters()
    ]
    assert blank.count.tolist() == [0, 7]
    assert not any(p.is_meta for p in net.parameters())


def test_a_checkpoint_says_who_wrote_it(tmp_path):
    """In JSON: the step, the images, how many processes, and each file's length."""
    saved(tmp_path, 3)
    folder = tmp_path / "step-00000003"
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["world"]) == (3, 1)
    files = {p.name: p.stat().st_size for p in folder.iterdir() if p.suffix == ".safetensors"}
    assert state["files"] == files
