"""The report: of real runs on real images, opened in a real browser, each number checked."""

import json
import math
import re

import numpy as np
import pytest

from ssl_vit.training.run_files import read_rows
from tests.browser import start_browser
from tests.unit.run_folders import make_run, train_row

SECTIONS = ("verdict", "scores", "curves", "training", "features", "options")
# 20 steps each of both methods, on CIFAR-10, with the laptop recipes' encoder.
CIFAR = (
    *("--encoder.image-size", "16", "--encoder.patch-size", "4", "--encoder.depth", "2"),
    *("--optim.batch-size", "32"),
    *("--run.length", "20st", "--run.probe-every", "10st", "--run.log-every", "5"),
    *("--run.save-every", "20st", "--run.probe-images", "100", "--data.workers", "0"),
)


@pytest.fixture(scope="module")
def runs(shared_door, shared_data):
    """A run of MAE and one of DINO on CIFAR-10: their folders."""
    cifar = shared_data / "cifar10"
    train, val = f"tar:{cifar / 'train-000000.tar'}", f"tar:{cifar / 'test-000000.tar'}"
    for method in ("mae", "dino"):
        data = ("--data.train", train, "--data.val", val, "--run.out", f"runs/{method}")
        recipe = ("--config", f"{method}_cifar10")
        result = shared_door("quick.py", method, *recipe, *CIFAR, *data)
        assert result.returncode == 0, result.stderr
    return [shared_door.folder / "runs" / method for method in ("mae", "dino")]


@pytest.fixture(scope="module")
def browser():
    browser = start_browser()
    yield browser
    browser.close()


def reported(door, *arguments):
    """The file that the door writes."""
    result = door("-m", "ssl_vit.report", *map(str, arguments))
    assert result.returncode == 0, result.stderr
    return door.folder / re.search(r": (\S+\.html) \(", result.stdout)[1]


@pytest.fixture(scope="module")
def one(runs, shared_door):
    return reported(shared_door, runs[0]), reported(shared_door, runs[1])


@pytest.fixture(scope="module")
def both(runs, shared_door):
    return reported(shared_door, *runs)


def charts(page):
    """The specifications in a page: by name."""
    text = re.search(
        r'<script id="charts" type="application/json">(.*?)</script>', page.read_text()
    )
    return json.loads(text[1])


def rows_of(chart):
    """The largest table of a chart's data."""
    return max(chart["datasets"].values(), key=len)


def looked_at(browser, page, dark=False, width=1280):
    """Open a page; nothing may be said in the console, and nothing be fetched."""
    browser.emulate(dark, width)
    browser.said()
    browser.open(page)
    assert browser.said() == []
    fetched = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []


@pytest.mark.parametrize("method", [0, 1], ids=["mae", "dino"])
def test_a_run_opened_in_a_browser(browser, one, method):
    page = one[method]
    looked_at(browser, page)
    for section in SECTIONS:
        text = browser.run("return document.getElementById(arguments[0]).innerText", section)
        assert len(text.split()) > 15, section
    assert browser.run("return document.querySelectorAll('.missing').length") == 0
    places = browser.run("return document.querySelectorAll('[data-chart]').length")
    assert places == len(charts(page)) > 8
    empty = browser.run(
        "return [...document.querySelectorAll('[data-chart]')].filter(p => ![...p.querySelectorAll("
        "'.mark-symbol path, .mark-line path, .mark-rect path, .mark-rule line')].length)"
        ".map(p => p.dataset.chart)"
    )
    assert empty == []
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert browser.run(broken) == 0


@pytest.mark.parametrize("method", [0, 1], ids=["mae", "dino"])
def test_every_curve_is_in_the_metrics_file(runs, one, method):
    """All finite values of every number, in order, at their steps; and none is left out."""
    rows, found = read_rows(runs[method] / "metrics.jsonl"), charts(one[method])
    status = json.loads((runs[method] / "status.json").read_text())
    lived = status["updated"] - status["started"]
    shown = set()
    for name, chart in found.items():
        if not name.startswith("curve-"):
            continue
        keys = {"mean patch": "knn20_mean", "[CLS]": "knn20_cls"}
        for series in {row["series"] for row in rows_of(chart)}:
            key = keys[series] if name == "curve-knn" else name.removeprefix("curve-")
            shown.add(key)
            logged = [(r["step"], r[key]) for r in rows if isinstance(r.get(key), int | float)]
            drawn = [r for r in rows_of(chart) if r["series"] == series]
            assert [(r["step"], r["value"]) for r in drawn] == logged
            assert all(r["images"] == r["step"] * 32 for r in drawn)
            hours = [r["hours"] for r in drawn]
            assert hours == sorted(hours)
            assert 0 < 3600 * hours[-1] <= lived
    own = {k for r in rows for k, v in r.items() if isinstance(v, float)}
    assert own - shown <= {"skipped", "saving_s", "looking_s", "held_out_images"}
    assert {"loss", "lr", "knn20_cls", "rankme", "feature_std"} <= shown


@pytest.mark.parametrize("method", [0, 1], ids=["mae", "dino"])
def test_scores_and_tiles_are_those_of_the_files(browser, runs, one, method):
    name = ("mae", "dino")[method]
    card = json.loads((runs[method] / "results.json").read_text())
    looked_at(browser, one[method])
    table = browser.run("return document.querySelector('table.scores').innerText")
    for of, row in card["scores"].items():
        for score in row.values():
            assert re.search(rf"{of}\s.*{score['metrics']['top1']:.2f} top1", table)
    drawn = {(r["of"], r["what"]): r for r in rows_of(charts(one[method])["scores"])}
    for of, row in card["scores"].items():
        for evaluator, score in row.items():
            shown = drawn[of, {"knn": "k-NN", "linear": "linear probe"}[evaluator]]
            numbers = [score["metrics"]["top1"], *score["interval"]]
            assert [shown["value"], shown["low"], shown["high"]] == numbers
    tiles = browser.run("return document.querySelector('.tiles').innerText")
    pooling = ("mean", "cls")[method]
    last = [r for r in read_rows(runs[method] / "metrics.jsonl") if "rankme" in r][-1]
    assert f"{last[f'knn20_{pooling}']:.1f} %" in tiles
    assert f"{card['scores'][f'{name} encoder']['linear']['metrics']['top1']:.1f} %" in tiles
    assert "640" in tiles  # 20 steps of 32
    cards = browser.run("return document.querySelector('#scores details pre').textContent")
    assert json.loads(cards) == {k: v for k, v in card.items() if k != "scores"}
    counts = card["scores"][f"{name} encoder"]["linear"]["confusion"]
    cells = rows_of(charts(one[method])["confusion-0"])
    assert [cell["images"] for cell in cells] == [n for row in counts for n in row]


def test_options_that_differ_come_first(browser, one):
    looked_at(browser, one[0])
    rows = browser.run(
        "return [...document.querySelectorAll('.options .changed')].map(r => r.innerText)"
    )
    assert any(re.match(r"--encoder.depth\s+2\s+0", row) for row in rows)
    assert any(re.match(r"--optim.batch-size\s+32\s+256", row) for row in rows)
    assert not any("--optim.betas" in row for row in rows)
    rest = browser.run("return document.querySelector('#options details').textContent")
    assert "--optim.betas" in rest


def test_the_axis_the_slider_and_the_hover(browser, one):
    looked_at(browser, one[0])
    labels = (
        "return [...document.querySelectorAll('[data-chart=curve-loss] .role-axis-label text')]"
        ".map(t => t.textContent)"
    )
    before = browser.run(labels)
    browser.run("document.querySelector('[name=xaxis][value=step]').click()")
    for _ in range(50):
        if (after := browser.run(labels)) != before:
            break
    assert "20" in after  # steps, not images
    assert "20" not in before
    browser.run("document.querySelector('[name=xaxis][value=hours]').click()")
    for _ in range(50):
        if (hours := browser.run(labels)) != after:
            break
    assert not [label for label in hours if label[-1] in "mµ"]  # thousandths of an hour
    shown = "return document.querySelector('.stages .stage.on img').alt"
    assert browser.run(shown) == "reconstruction after 20 steps"
    move = (
        "const s = document.querySelector('.stages input'); s.value = 0;"
        "s.dispatchEvent(new Event('input'))"
    )
    browser.run(move)
    assert browser.run(shown) == "reconstruction after 10 steps"
    place = browser.run(
        "const m = document.querySelector('.map'); m.scrollIntoView({block: 'center'});"
        "const r = m.querySelector('.mark-symbol.role-mark path').getBoundingClientRect();"
        "return [r.x + r.width / 2, r.y + r.height / 2]"
    )
    for shift in (3, 0):
        browser.command(
            "Input.dispatchMouseEvent", type="mouseMoved", x=place[0] + shift, y=place[1]
        )
    tip = "const i = document.querySelector('#vg-tooltip-element.visible img'); return i && i.src"
    for _ in range(100):
        if source := browser.run(tip):
            break
    images = {point["image"] for point in rows_of(charts(one[0])["map-0"])}
    assert source in images


def test_the_map_is_of_the_held_out_images(runs, one):
    for run, page in zip(runs, one, strict=True):
        (folder,) = (run / "tensorboard").glob("*/features")
        points = rows_of(charts(page)["map-0"])
        _, *labels = (folder / "metadata.tsv").read_text().splitlines()
        assert [point["label"] for point in points] == [line.split("\t")[0] for line in labels]
        assert len(points) == 100
        assert all(point["image"].startswith("data:image/") for point in points)
        assert np.isfinite([[p["x"], p["y"]] for p in points]).all()


def test_two_runs_side_by_side(browser, both, runs):
    """One curve each in one chart, at equal images; all parts of both."""
    looked_at(browser, both)
    assert both == runs[0].parent / "report.html"
    assert browser.run("return document.querySelectorAll('#verdict .column').length") == 2
    series = {row["series"] for row in rows_of(charts(both)["curve-loss"])}
    assert series == {"mae", "dino"}
    assert {row["series"] for row in rows_of(charts(both)["curve-kl"])} == {"dino"}
    equal = browser.run("return document.getElementById('equal').innerText")
    for run, key in zip(runs, ("knn20_mean", "knn20_cls"), strict=True):
        called = {"knn20_mean": "k = 20, mean patch", "knn20_cls": r"k = 20, \[CLS\]"}[key]
        last = [r for r in read_rows(run / "metrics.jsonl") if "rankme" in r][-1]
        assert re.search(rf"{run.name}\s+{called}\s+640\s+0:\d+\s+{last[key]:.1f}", equal)
    headings = browser.run("return document.getElementById('training').innerText")
    for kind in ("Attention", "Reconstruction", "Neighbours", "PCA"):
        assert kind in headings
    assert {"map-0", "map-1"} <= set(charts(both))


def test_on_a_phone_in_the_dark_and_on_paper(browser, both, one):
    """Nothing is wider than the phone; text can be read on what is behind it; paper has all."""
    for page in (both, one[1]):
        looked_at(browser, page, width=390)
        assert browser.run("return document.documentElement.scrollWidth") <= 390
    light = (
        "const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);"
        "const sum = c => rgb(c).reduce((a, b) => a + b);"
        "const text = document.querySelector('[data-chart=curve-loss] .role-axis-label text');"
        "return [sum(getComputedStyle(document.querySelector('section')).backgroundColor),"
        " sum(getComputedStyle(document.body).color), sum(getComputedStyle(text).fill)]"
    )
    looked_at(browser, one[1])
    paper, ink, label = browser.run(light)
    assert paper > 700
    assert max(ink, label) < 200
    looked_at(browser, one[1], dark=True)
    paper, ink, label = browser.run(light)
    assert paper < 200
    assert min(ink, label) > 500
    printed = browser.printed()
    assert printed.startswith(b"%PDF")
    assert len(printed) > 100_000


def test_the_same_folder_gives_the_same_page(runs, one, shared_door):
    again = reported(shared_door, runs[0], "--out", "again.html")
    date = re.compile(r"Made \d{4}-\d\d-\d\d \d\d:\d\d UTC")
    assert date.sub("", again.read_text()) == date.sub("", one[0].read_text())


def damage(folder):
    """Break every file that a report reads."""
    (folder / "metrics.jsonl").write_bytes(b"\x00\xff\xfe{" * 50 + b"\n")
    (folder / "config.yaml").write_text("run: [unclosed")
    (folder / "status.json").write_text("{")
    (folder / "results.json").write_text('{"evaluator": "pretrain", "scores": {"a": {"knn": 3}}}')
    (folder / "encoder.safetensors").write_bytes(b"no")
    for file in folder.glob("panels/*/*.png"):
        file.write_bytes(file.read_bytes()[:40])
    for file in folder.glob("tensorboard/*/features/*.tsv"):
        file.write_text("1\t2\nx")


def test_runs_that_are_not_whole(browser, door):
    """Stopped at its first step, without labels, of one channel, with every file broken, empty."""
    images = door.folder / "images"
    images.mkdir()
    for i in range(30):
        np.save(images / f"{i}.npy", np.random.default_rng(i).integers(0, 255, (8, 8), np.uint8))
    own = ("--data.train", f"flat:{images}", "--data.val", "", "--optim.batch-size", "8")
    first = door.pretrain(*own, "--run.length", "1st", "--run.out", "first")
    assert first.returncode == 0, first.stderr
    gray = door.pretrain(
        *own, "--run.length", "4st", "--run.probe-every", "2st", "--run.out", "gray"
    )
    assert gray.returncode == 0, gray.stderr
    broken = door.pretrain("--run.length", "4st", "--run.out", "broken")
    assert broken.returncode == 0, broken.stderr
    make_run(door.folder / "bare", [], {"state": "stopped", "total": 9, "reason": "SIGTERM came"})
    sizeless = make_run(door.folder / "sizeless", [train_row(10), train_row(20)], config="")
    (sizeless / "status.json").unlink()
    tuned = door(
        *("-m", "ssl_vit.evaluate", "finetune", "--encoder", "broken", "--run.out", "tuned"),
        *("--run.length", "2st", "--data.train", "digits:train", "--data.val", "digits:val"),
        *("--data.workers", "0", "--optim.batch-size", "20", "--data.channels", "1"),
    )
    assert tuned.returncode == 0, tuned.stderr
    damage(door.folder / "broken")
    expected = {
        "first": ["8 images seen in 1 of 1 steps", "no labels", "No scores"],
        "gray": ["32 images seen", "No scores", "they have no labels"],
        "broken": ["Missing or damaged", "metrics.jsonl", "config.yaml", "No map", "No options"],
        "sizeless": ["20 steps", "the size of a batch is not known"],
        "tuned": ["beginning with", "held-out accuracy", "a fine-tuning keeps none", "fine-tuning"],
        "bare": ["stopped", "SIGTERM came", "Nothing has been logged yet", "No map", "No pictures"],
    }
    for name, texts in expected.items():
        page = reported(door, door.folder / name)
        looked_at(browser, page)
        text = browser.run("return document.body.innerText")
        for said in texts:
            assert said in text, (name, said)
    looked_at(browser, reported(door, *(door.folder / name for name in expected)))


def test_what_is_in_files_is_text_and_nothing_more(browser, door):
    """Names that would be HTML or end the script that they stand in."""
    evil = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"
    rows = [train_row(10, **{evil: 1.0}), {"step": 10, "warning": f"step 10: {evil}"}]
    folder = make_run(
        door.folder / "evil", rows, {"device": evil, "state": "failed", "reason": evil}
    )
    page = reported(door, folder)
    looked_at(browser, page)
    assert browser.run("return document.title") == "evil · ssl_vit report"
    assert browser.run("return document.images.length") == 0
    assert evil in browser.run("return document.body.innerText")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no run is named"),
        (("runs/a", "runs/../runs/a"), "RUN names the same run twice"),
        (("nowhere",), "'nowhere'; there is no such folder"),
        (("runs",), "which is no run; it contains runs, such as runs/a"),
        (("empty",), "'empty', which is no run"),
        (("runs/a", "--out", "page.txt"), "its name must end in .html"),
        (("runs/a", "--out", "nowhere/page.html"), "there is no folder 'nowhere'"),
        (("runs/a", "--sead", "1"), "unknown option '--sead' (nearest known: --seed"),
    ],
)
def test_mistakes_are_one_line(door, arguments, said):
    make_run(door.folder / "runs" / "a", [train_row(10)])
    (door.folder / "empty").mkdir()
    result = door("-m", "ssl_vit.report", *arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(door.folder.rglob("*.html")) == []


def test_long_runs_are_thinned_by_means():
    """Nothing is lost of a mean, and the last step stays."""
    from ssl_vit.reporting.charts import MOST_POINTS, thinned

    points = [{"step": i, "value": math.sin(i)} for i in range(1, 6 * MOST_POINTS + 1)]
    few = thinned(points)
    assert len(few) == MOST_POINTS
    assert few[-1]["step"] == points[-1]["step"]
    mean = sum(p["value"] for p in points) / len(points)
    assert sum(p["value"] for p in few) / len(few) == pytest.approx(mean)
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]
