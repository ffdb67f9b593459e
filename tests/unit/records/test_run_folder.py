"""Runs read from folders in every condition."""

import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ssl_vit.common.processes import boot, process_start
from ssl_vit.records import run_folder
from ssl_vit.records.run_folder import Run, find_runs, read_run
from ssl_vit.records.run_state import span
from ssl_vit.records.status import Status, write_status

CONFIG = """
run: {out: %s, length: 2ep}
encoder: {arch: vit_tiny_patch16_224, image_size: [8]}
optim: {batch_size: 100}
"""
HERE = {"host": platform.node(), "pid": os.getpid(), "process_started": process_start(os.getpid())}
DOOR = {"name": "mae", "command": "python -m ssl_vit.pretrain mae"}


def make(folder: Path, *rows: object, status: Status | None = None) -> Path:
    """A run folder with these rows."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG % folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if status:
        write_status(folder, status)
    return folder


def checkpoint(folder: Path, step: int, count: int = 1000) -> None:
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({"step": step, "images": {"count": count}}))


def age(folder: Path, seconds: float) -> None:
    """As if nothing had been written since."""
    then = time.time() - seconds
    for name in ("metrics.jsonl", "status.json"):
        if (folder / name).exists():
            os.utime(folder / name, (then, then))


def line(step: int, rate: float = 1000.0, **more: object) -> dict[str, object]:
    return {"step": step, "loss": 1.0 / step, "images_per_s": rate, **more}


def test_numbers(tmp_path):
    rows = [line(10), {"step": 10, "knn20_cls": 50.0, "knn20_mean": 60.0}, line(20, loss=None)]
    status = Status("running", total=40, images_per_step=200, pooling="cls", **HERE, **DOOR)
    run = read_run(make(tmp_path / "a", *rows, status=status))
    assert (run.method, run.step, run.total, run.images_per_step) == ("mae", 20, 40, 200)
    assert run.config["run.length"] == "2ep"
    assert run.series("loss") == [(10, 0.1)]
    assert run.latest("loss") == 0.1
    assert run.latest("nothing") is None
    assert run.knn == ("knn20_cls", 50.0)
    assert run.seconds_left == 20 * 200 / 1000
    assert (run.state, run.said, run.resume, run.problems) == ("running", "", "", [])


def rates(*values: object, size: int = 200, every: int = 10) -> Run:
    """A running run with such rates in its lines."""
    rows = [line(every * i, v) for i, v in enumerate(values, 1)]
    done = every * len(rows)
    status = Status("running", step=done, total=done + 100, images_per_step=size)
    return Run(Path("a"), rows=rows, status=status, state="running")


def test_a_busy_moment_changes_neither_the_rate_nor_the_time_left():
    """As in the line of progress: of the last minute, or of nine lines."""
    run = rates(*[1000.0] * 8, 100.0)
    assert run.latest("images_per_s") == 100.0
    assert run.images_per_second == pytest.approx(1000)
    assert run.seconds_left == pytest.approx(20)
    assert rates(*[1000.0] * 50, *[100.0] * 5).images_per_second == pytest.approx(100)
    assert rates(*[1000.0] * 50, *[100.0] * 5, every=1).images_per_second == pytest.approx(1000)


def test_rows_without_a_rate_are_no_intervals():
    run = rates(None, 1000.0, None, 0.0, -1.0, "7", 1000.0, 10**400)
    assert run.images_per_second == pytest.approx(1000)
    for run in (rates(), rates(None, 0.0)):
        assert run.images_per_second is None
        assert run.seconds_left is None


def test_rates_are_smoothed_where_the_size_of_a_batch_is_unknown():
    run = Run(Path("a"), rows=[line(10 * i) for i in range(1, 9)] + [line(90, 100.0)])
    assert run.images_per_step is None
    assert run.images_per_second == pytest.approx(1000)


@pytest.mark.parametrize("step", [10**400, -(10**400), 0])
@pytest.mark.parametrize("rate", [1e-320, 1e308, 10**300])
def test_rates_and_steps_beyond_reason_raise_nothing(step, rate):
    rows = [line(10), {"step": step, "images_per_s": rate}, {"step": 30, "images_per_s": rate}]
    run = Run(Path("a"), rows=rows, status=Status("running", total=40, images_per_step=200))
    assert run.images_per_second is None or run.images_per_second >= 0


def test_values_that_are_no_numbers(tmp_path):
    values = [1, 2.5, None, True, "3", [4], 10**400, float("nan"), float("inf")]
    run = read_run(make(tmp_path / "a", *({"step": i, "x": v} for i, v in enumerate(values))))
    assert run.series("x") == [(0, 1.0), (1, 2.5)]


def test_knn_is_the_newest_and_of_the_methods_own_feature_or_the_best():
    rows = [
        {"step": 1, "knn20_cls": 99.0},
        {"step": 2, "knn5_cls": 50.0, "knn5_mean": 60.0},
        {"step": 3, "loss": 1.0},
    ]
    assert Run(Path("a"), rows=rows).knn == ("knn5_mean", 60.0)
    own = Status("running", pooling="cls")
    assert Run(Path("a"), rows=rows, status=own).knn == ("knn5_cls", 50.0)
    assert Run(Path("a")).knn is None


def test_torn_lines_are_passed_over_and_counted(tmp_path):
    folder = make(tmp_path / "a", line(1))
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo\n\x00\x00\xff\n[1]\n{"loss": 1}\n{"step": true}\n\n')
        file.write(b'{"step": 3}\n{"step": 4')  # the last is in the writing
    run = read_run(folder)
    assert [row["step"] for row in run.rows] == [1, 3]
    assert run.problems == [f"{folder}/metrics.jsonl: 5 lines cannot be read, ignored"]


@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"a: [", b"- 1", b"3", b"1: 2", b"[" * 9999])
@pytest.mark.parametrize(
    "name",
    ["config.yaml", "metrics.jsonl", "status.json", "encoder.safetensors", "model.safetensors"],
)
def test_any_file_may_be_damaged(tmp_path, name, content):
    folder = make(tmp_path / "a", line(1), status=Status("stopped"))
    checkpoint(folder, 1)
    (folder / name).write_bytes(content)
    run = read_run(folder)
    if content or name != "metrics.jsonl":  # which is empty before the first line
        assert len(run.problems) == (0 if name == "metrics.jsonl" and content == b"3" else 1) or (
            name == "metrics.jsonl"  # a line without an end may be in the writing
        )
        assert all(name in problem and "\n" not in problem for problem in run.problems)


def test_nothing_there(tmp_path):
    run = read_run(tmp_path / "nowhere")
    assert (run.state, run.step, run.total, run.method, run.resume) == ("unknown", 0, None, "", "")
    assert [problem.rpartition(": ")[2] for problem in run.problems] == ["not there"] * 2


def test_a_folder_in_the_place_of_a_file(tmp_path):
    for name in ("config.yaml", "metrics.jsonl", "status.json"):
        (tmp_path / name).mkdir()
    assert len(read_run(tmp_path).problems) == 3


def test_a_run_that_has_just_begun_lacks_nothing(tmp_path):
    folder = make(tmp_path / "a", status=Status("running", **HERE))
    (folder / "metrics.jsonl").unlink()
    assert read_run(folder).problems == []


def test_metrics_are_read_again_only_when_they_change(tmp_path, monkeypatch):
    folder = make(tmp_path / "a", line(1), status=Status("running", **HERE))
    first = read_run(folder)
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "read_metrics", lambda path: pytest.fail("read again"))
        write_status(folder, Status("finished"))
        second = read_run(folder, first)
    assert (second.state, second.rows) == ("finished", first.rows)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line(2)) + "\n")
    assert read_run(folder, second).step == 2


# --- what state a run is in ----------------------------------------------------------------------


def test_gone_and_reused_process_numbers(tmp_path):
    for name, change in (("gone", {"pid": 2**22 + 1}), ("reused", {"process_started": 1})):
        folder = make(
            tmp_path / name, line(1), status=Status("running", **{**HERE, **DOOR, **change})
        )
        checkpoint(folder, 1)
        run = read_run(folder)
        assert run.state == "killed"
        assert "newest checkpoint is at step 1" in run.said
        assert run.resume == f"python -m ssl_vit.pretrain mae --config {folder}/config.yaml"


@pytest.mark.skipif(not boot(), reason="the system does not tell it")
def test_a_machine_is_known_by_its_kernels_start(tmp_path):
    """Not by its name, which is another in each container, and may be another machine's, too."""
    gone = Status("running", **{**HERE, "pid": 2**22 + 1, "boot": boot()})
    for status, state in (
        (gone, "killed"),
        (replace(gone, host="container"), "killed"),
        (replace(gone, boot="of another machine"), "running"),
        (replace(gone, processes_of=1), "running"),
        (replace(gone, boot="", host="far"), "running"),
    ):
        folder = make(tmp_path / status.host / status.boot[:2] / state, line(1), status=status)
        assert read_run(folder).state == state


def test_a_system_that_tells_no_start_is_asked_for_the_number_alone(tmp_path):
    own = Status("running", host=platform.node(), pid=os.getpid())
    assert read_run(make(tmp_path / "a", line(1), status=own)).state == "running"
    gone = Status("running", host=platform.node(), pid=2**22 + 1)
    assert read_run(make(tmp_path / "b", line(1), status=gone)).state == "killed"


def test_a_run_that_ends_while_it_is_read(tmp_path, monkeypatch):
    """Its process is seen to be gone; it had said how before it went."""
    folder = make(tmp_path / "a", status=Status("running", **{**HERE, "pid": 2**22 + 1}))
    real = run_folder.gone

    def ending(status):
        write_status(folder, Status("finished"))
        return real(status)

    monkeypatch.setattr(run_folder, "gone", ending)
    assert read_run(folder).state == "finished"


@pytest.mark.parametrize(
    ("rows", "quiet", "state"),
    [
        ([line(10), line(20)], 500, "running"),  # 10 minutes, whatever it does
        ([line(10), line(20)], 700, "silent"),
        ([line(10), line(20, rate=5.0)], 1900, "running"),  # a line takes 200 s
        ([line(10), line(20, rate=5.0)], 2100, "silent"),
        ([line(10, looking_s=300.0), line(20)], 2900, "running"),  # a look takes 300 s
        ([line(10, looking_s=300.0), line(20)], 3100, "silent"),
        ([], 3000, "running"),  # nothing usual is known
        ([], 4000, "silent"),
        ([line(39), line(40)], 3000, "running"),  # after its last step it judges
        ([line(39), line(40)], 4000, "silent"),
    ],
)
def test_a_run_on_another_machine_is_judged_by_its_silence(tmp_path, rows, quiet, state):
    status = Status("running", total=40, images_per_step=100, host="far", job="7", **DOOR)
    folder = make(tmp_path / "a", *rows, status=status)
    age(folder, quiet)
    run = read_run(folder)
    assert run.state == state
    if state == "silent":
        assert "on far, job 7; check that it has ended" in run.said
        assert "UTC" in run.said
        assert run.resume


def test_stopped_and_failed_by_their_own_word(tmp_path):
    status = Status("failed", step=7, total=40, reason="the disk is full", **DOOR)
    run = read_run(make(tmp_path / "a", line(5), status=status))
    assert run.state == "failed"
    assert run.said == "at step 7 of 40: the disk is full; no checkpoint yet: it would start anew"
    assert run.step == 7


def test_older_runs_are_told_by_their_checkpoints(tmp_path):
    folder = make(tmp_path / "a", line(10))
    checkpoint(folder, 10)
    age(folder, 7200)
    run = read_run(folder)
    assert (run.state, run.total, run.steps_per_epoch) == ("stopped", 20, 10)
    checkpoint(folder, 20)
    assert read_run(folder).state == "finished"
    checkpoint(other := make(tmp_path / "b", line(10)), 10)
    assert (read_run(other).state, "may still run" in read_run(other).said) == ("unknown", True)
    (other / "results.json").write_text("{}")
    assert read_run(other).state == "finished"


def test_the_command_names_the_folder_that_the_run_is_in_now(tmp_path):
    folder = make(tmp_path / "a b", status=Status("stopped", **DOOR))
    config = f"--config '{folder}/config.yaml'"
    assert read_run(folder).resume == f"python -m ssl_vit.pretrain mae {config}"
    moved = folder.rename(tmp_path / "c")
    assert read_run(moved).resume.endswith(f"{moved}/config.yaml --run.out {moved}")


def test_fine_tuning_without_its_word(tmp_path):
    folder = make(tmp_path / "a", line(1))
    with open(folder / "config.yaml", "a") as file:
        file.write("tune: {ema: 0.0}\n")
    assert read_run(folder).method == "finetune"
    assert read_run(folder).resume.startswith("python -m ssl_vit.evaluate finetune --config")


def test_warnings_of_the_last_interval():
    rows = [line(10), {"step": 10, "warning": "old"}, line(20), {"step": 20, "warning": "new"}]
    assert Run(Path("a"), rows=rows).warnings == ["new"]


def test_spans():
    assert [span(s) for s in (40.0, 119.0, 120.0, 7199.0, 7200.0, 1e6)] == [
        "40 s", "119 s", "2 min", "120 min", "2 h", "12 days",
    ]  # fmt: skip


# --- which folders are runs ----------------------------------------------------------------------


def test_runs_are_found_wherever_they_are(tmp_path):
    make(tmp_path / "mae")
    make(tmp_path / "mae/finetune")
    make(tmp_path / "mae-before-1")
    make(tmp_path / "sweep/optim.lr=1e-4")
    (tmp_path / "only-config").mkdir()
    (tmp_path / "only-config/config.yaml").write_text("run: {out: x}")
    (tmp_path / "only-status").mkdir()
    write_status(tmp_path / "only-status", Status("running"))
    for name in ("checkpoints", "tensorboard", "panels"):
        make(tmp_path / "mae" / name / "inner")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.yaml").write_text("model: {size: 3}")
    (tmp_path / "file").write_text("")
    found = [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert found == [
        "mae", "mae/finetune", "mae-before-1", "only-config", "only-status", "sweep/optim.lr=1e-4",
    ]  # fmt: skip
    assert find_runs(tmp_path / "mae/finetune") == [tmp_path / "mae/finetune"]
    assert find_runs(tmp_path / "nowhere") == []


@pytest.mark.parametrize("last", ["run", "again"])
def test_links_lead_to_runs_once_and_never_round(tmp_path, monkeypatch, last):
    """In whatever order a disk names them."""
    real = Path.iterdir

    def ordered(path):
        return iter(sorted(real(path), key=lambda inner: inner.name == last))

    monkeypatch.setattr(Path, "iterdir", ordered)
    make(tmp_path / "far/run")
    here = make(tmp_path / "here/run").parent
    (here / "a-link").symlink_to(tmp_path / "far")
    (here / "again").symlink_to(here / "run")
    (here / "run/loop").symlink_to(here)
    (here / "self").symlink_to(here / "self")
    assert find_runs(here) == [here / "a-link/run", here / "run"]


def test_a_folder_that_may_not_be_looked_into_is_passed_over(tmp_path, monkeypatch):
    make(tmp_path / "a")
    make(tmp_path / "b/secret")
    real = Path.iterdir

    def guarded(path):
        if path.name == "b":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "iterdir", guarded)
    assert find_runs(tmp_path) == [tmp_path / "a"]
