"""Quality per minute, as a user calls it: two methods, killed between them, and once more."""

import json
from pathlib import Path

import pytest

from tests.integration.conftest import TINY, TINY_DINO

LOOKS = "probe_images: 200"
COMMAND = (
    *("-m", "ssl_vit.benchmark", "quality", "--minutes", "0.02", "--looks", "2", "--out", "q"),
    *("--data.train", "digits:train", "--data.val", "digits:val"),
)


def test_two_methods_are_trained_for_equal_time_and_judged_alike(door):
    """The second call trains and judges only what is not done; the third nothing."""
    for name, recipe in (("mae_tiny.yaml", TINY), ("dino_tiny.yaml", TINY_DINO)):
        (door.folder / name).write_text(recipe.replace("probe_images: 60", LOOKS))
    first = door(*COMMAND, "--methods", "mae_tiny.yaml")
    assert first.returncode == 0, first.stderr
    begun = json.loads((door.folder / "q" / "quality.json").read_text())
    half_done(door.folder / "q" / "quality.json", begun)
    done = door(*COMMAND, "--methods", "mae_tiny.yaml,dino_tiny.yaml")
    assert done.returncode == 0, done.stderr
    report = json.loads((door.folder / "q" / "quality.json").read_text())
    check_report(report, door.folder / "q")
    ours = report["runs"]["mae_tiny-seed0"]
    assert ours == begun["runs"]["mae_tiny-seed0"]  # trained once: it was judged again
    again = door(*COMMAND, "--methods", "mae_tiny.yaml,dino_tiny.yaml")
    assert "mae_tiny-seed0 is done" in again.stderr
    assert json.loads((door.folder / "q" / "quality.json").read_text()) == report
    assert all(name in again.stdout for name in ("mae_tiny", "dino_tiny", "raw pixels"))


def half_done(path: Path, report: dict) -> None:
    """As if it had been killed when the run had been trained, and not been judged."""
    run = report["runs"]["mae_tiny-seed0"]
    kept = {k: run[k] for k in ("recipe", "method", "seed", "config", "planned")}
    path.write_text(json.dumps(report | {"runs": {"mae_tiny-seed0": kept}, "baselines": {}}))


def check_report(report: dict, out: Path) -> None:
    assert list(report["runs"]) == ["mae_tiny-seed0", "dino_tiny-seed0"]
    assert {"cpu", "threads", "memory_bytes"} <= set(report["hardware"])
    assert {"torch", "python"} <= set(report["versions"])
    for name, run in report["runs"].items():
        assert (out / run["config"]).is_file()
        steps = run["planned"]["steps"]
        assert steps == max(1, round(run["planned"]["images_per_second"] * 1.2 / 120))
        assert run["images_seen"] == steps * 120
        assert run["images_per_second"] == pytest.approx(steps * 120 / (60 * run["minutes"]))
        assert run["curve"][-1][0] == pytest.approx(run["minutes"])
        knn, linear = run["scores"]["knn"], run["scores"]["linear"]
        assert knn["setting"] == "k=20"
        assert knn["interval"][0] <= knn["value"] <= knn["interval"][1]
        card = json.loads((out / linear["card"]).read_text())
        assert (card["val"]["images"], card["scores"][0]["metrics"]["top1"]) == (
            359,
            linear["value"],
        )
        assert f"| {name.removesuffix('-seed0')} |" in (out / "quality.md").read_text()
    names = ["raw pixels", "untrained, as mae_tiny", "untrained, as dino_tiny"]
    assert list(report["baselines"]) == names
    assert (out / "quality.png").read_bytes()[:4] == b"\x89PNG"
