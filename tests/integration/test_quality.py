"""Quality per minute: runs in processes of their own, and a folder that is gone on with."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssl_vit.benchmark import main
from ssl_vit.benchmarks import own_process
from ssl_vit.commands import quality
from ssl_vit.common.errors import UserError
from ssl_vit.evaluators.linear import LinearProtocol
from ssl_vit.weights.exchange import read_info
from tests.forks import SPAWNS, Fork
from tests.integration.conftest import QUICK, TINY, TINY_DINO

COMMAND = ("quality", "--minutes", "0.02", "--looks", "2", "--out", "q", "--data.train")
COMMAND += ("digits:train", "--data.val", "digits:val", "--run.save-every", "100st")
COMMAND += ("--optim.batch-size", "40", "--methods")
BOTH = "mae_tiny.yaml,dino_tiny.yaml"
STEPS, BATCH = 8, 40


class Forked(Fork):
    """A fork for what a user's Python would start: a second instead of five."""

    def __init__(self, command, **_):
        given = ["quick.py", *command[3:]]  # instead of python -m ssl_vit.pretrain
        super().__init__(given, Path.cwd(), os.environ | {"OMP_NUM_THREADS": "1"})

    def poll(self):
        return self.returncode

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def wait(self):
        self.process.join()
        return self.returncode


def test_a_half_finished_comparison_is_finished(tmp_path, monkeypatch, capsys, caplog):
    """One method is done, and the other was killed before its first step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quality, "subprocess", SimpleNamespace(Popen=Forked))
    monkeypatch.setattr(own_process, "multiprocessing", SPAWNS)
    # How well a probe learns is shown where it is tested; here its score has to be the report's.
    monkeypatch.setattr(LinearProtocol, "steps", lambda self, n: 20)
    caplog.set_level("INFO", "ssl_vit")
    files = {"mae_tiny.yaml": TINY, "dino_tiny.yaml": TINY_DINO, "quick.py": QUICK}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    path = tmp_path / "q" / "quality.json"
    assert main([*COMMAND, "mae_tiny.yaml"]) == 0
    half = json.loads(path.read_text())
    checkpoints = [p.stat().st_mtime_ns for p in (tmp_path / "q/runs").rglob("state.json")]
    path.write_text(json.dumps(half | {"runs": half["runs"] | {"dino_tiny-seed0": planned()}}))

    assert main([*COMMAND, BOTH]) == 0
    assert main([*COMMAND, "dino_tiny.yaml", "--against", "original"]) == 0
    report = json.loads(path.read_text())
    assert "mae_tiny-seed0 is done" in caplog.text
    assert report["runs"]["mae_tiny-seed0"] == half["runs"]["mae_tiny-seed0"]
    now = [p.stat().st_mtime_ns for p in (tmp_path / "q/runs/mae_tiny-seed0").rglob("state.json")]
    assert now == checkpoints
    assert report["runs"]["dino_tiny-seed0"]["images_seen"] == STEPS * BATCH
    check_peers(report)
    check_report(report, tmp_path / "q")
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("mae_tiny", "dino_tiny", "raw pixels", "quality.png"))


def planned() -> dict:
    """A run whose rate is measured, and no more."""
    numbers = {"minutes": 0.02, "images_per_second": STEPS * BATCH / 1.2, "steps": STEPS}
    config = "runs/dino_tiny-seed0/config.yaml"
    about = {"recipe": "dino_tiny", "method": "dino", "seed": 0, "config": config}
    return about | {"planned": numbers}


def check_peers(report: dict) -> None:
    """The original's modules and augmentations, after ours and judged alike; then they are gone."""
    run = report["runs"].pop("dino_tiny-original-seed0")
    assert run["recipe"] == "dino_tiny, original"
    assert (run["images_seen"], run["curve"]) == (run["planned"]["steps"] * BATCH, [])
    folders = ("dino_tiny-seed0", "dino_tiny-original-seed0")
    infos = [read_info(Path("q/runs") / folder / "encoder.safetensors") for folder in folders]
    assert (infos[0].mean, infos[0].config) == (infos[1].mean, infos[1].config)
    value = run["scores"]["knn"]["value"]
    line = f"| dino_tiny, original | {run['images_per_second']:,.0f} |"
    text = Path("q/quality.md").read_text()
    assert line in text
    assert f"| {value:.1f} ±" in text[text.index(line) :]


def check_report(report: dict, out: Path) -> None:
    assert list(report["runs"]) == ["mae_tiny-seed0", "dino_tiny-seed0"]
    assert {"cpu", "threads", "memory_bytes"} <= set(report["hardware"])
    assert {"torch", "python"} <= set(report["versions"])
    assert {"date", "commit"} <= set(report)
    text = (out / "quality.md").read_text()
    for name, run in report["runs"].items():
        steps = run["planned"]["steps"]
        assert steps == max(1, round(run["planned"]["images_per_second"] * 1.2 / BATCH))
        assert f"length: {steps}st" in (out / run["config"]).read_text()
        assert run["images_seen"] == steps * BATCH
        assert run["images_per_second"] == pytest.approx(steps * BATCH / (60 * run["minutes"]))
        assert len(run["curve"]) == min(2, steps)
        assert run["curve"][-1][0] == pytest.approx(run["minutes"])
        knn, linear = run["scores"]["knn"], run["scores"]["linear"]
        assert knn["setting"] == "k=20"
        assert knn["interval"][0] <= knn["value"] <= knn["interval"][1]
        card = json.loads((out / linear["card"]).read_text())
        assert (card["train"]["images"], card["val"]["images"]) == (1438, 359)
        assert card["scores"][0]["metrics"]["top1"] == linear["value"]
        cell = f"{knn['value']:.1f} ±"
        assert f"| {run['method']} | {name.removesuffix('-seed0')} |" in text
        assert cell in text
    names = ["raw pixels", "untrained, as mae_tiny", "untrained, as dino_tiny"]
    assert list(report["baselines"]) == names
    assert all(f"| {name} |" in text for name in names)
    assert (out / "quality.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            ("--against", "orignal"),
            r"--against is 'orignal'; allowed for quality of dino: original",
        ),
        (("--against", "original", "--optim.name", "muon"), r"peers \(--against\) train by AdamW"),
        (("--against", "original", "--data.preset", "gray"), "give --data.preset natural"),
        (("--against", "original", "--encoder.stem", "conv"), "has a convolutional stem"),
        (("--against", "original", "--encoder.norm-eps", "1e-5"), "epsilon in its norms"),
        (
            ("--against", "original", "--init.encoder", "x"),
            "--init.encoder is x; --against or",
        ),
        (("--against", "original", "--optim.encoder-lr", "0.5"), "--optim.encoder-lr is 0.5; "),
    ],
)
def test_what_a_peer_cannot_train_is_refused_first(more, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dino_tiny.yaml").write_text(TINY_DINO)
    with pytest.raises(UserError, match=reason):
        main([*COMMAND, "dino_tiny.yaml", *more])
    assert not Path("q").exists()


def test_a_run_that_cannot_be_trained_is_refused_by_its_reason(tmp_path, monkeypatch):
    """What its own door says in its first steps is the one line, and nothing was trained."""
    monkeypatch.chdir(tmp_path)
    Path("mae_tiny.yaml").write_text(TINY)
    with pytest.raises(UserError, match=r"^mae_tiny: --optim.batch-size is 5000; digits:train has"):
        main([*COMMAND, "mae_tiny.yaml", "--optim.batch-size", "5000"])
    assert not list(Path("q").rglob("checkpoints"))
