"""Fine-tuning of pixels as a user calls it: learning, going on, two processes, files, mistakes."""

import json
import signal

import pytest
from PIL import Image

from ssl_vit.benchmarks.scenes import open_studio, write_scenes
from tests.distributed.together import together
from tests.integration.test_bad_input import refused
from tests.integration.test_finetune import KILLER

# Draws of every kind, and stochastic depth.
TUNE = """
run: {length: 6st, save_every: 2st, probe_every: 1000ep, log_every: 1}
data: {train: '%s:train', val: '%s:val', workers: 0}
scratch: {arch: vit_tiny_patch16_224, image_size: [32], patch_size: 8, width: 32, depth: 4,
  heads: 2}
tune: {flip: 0.5, vertical_flip: 0.2, quarter_turns: 0.2}
optim: {batch_size: 6, lr: 1.0e-3, warmup: 2st}
"""
KINDS = {
    "pairs": ("--segment.head", "transformer"),
    "depth": ("--depth.head", "dpt", "--depth.scale", "0.001"),
}


@pytest.fixture(scope="module")
def scenes(shared_door):
    """A folder with scenes of digits, options for each kind, and a script that kills itself."""
    for part, count, seed in (("train", 18, 0), ("val", 6, 1)):
        studio = open_studio(f"digits:{part}", "", 48, 3, seed)
        write_scenes(studio, count, shared_door.folder / part, [str(n) for n in range(10)])
    for kind in KINDS:
        (shared_door.folder / f"{kind}.yaml").write_text(TUNE % (kind, kind))
    text = KILLER.replace('"mid-epoch"', '"middle"').replace("at_call(14,", "at_call(6,")
    (shared_door.folder / "killer.py").write_text(text)
    return shared_door


def tuned(door, kind, *more, module=("-m", "ssl_vit.evaluate", "finetune")):
    arguments = ("--config", f"{kind}.yaml", "--encoder", "none", *KINDS[kind], *more)
    return door(*module, *arguments)


def outcome(folder):
    """All that a finished run leaves of its training, as bytes."""
    last = folder / "checkpoints" / "step-00000006"
    files = [last / "task.safetensors", last / "optimizer.safetensors"]
    return [file.read_bytes() for file in [*files, folder / "model.safetensors"]]


@pytest.fixture(scope="module")
def unbroken(scenes):
    for kind in KINDS:
        done = tuned(scenes, kind, "--run.out", kind)
        assert done.returncode == 0, done.stderr
    return scenes.folder


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_is_bit_identical(scenes, unbroken, kind):
    options = ("--run.out", f"{kind}-killed", "--data.workers", "1")
    killed = tuned(scenes, kind, *options, module=("killer.py", "middle"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = tuned(scenes, kind, *options)
    assert again.returncode == 0, again.stderr
    assert "step 2 of 6" in again.stderr or "step 4 of 6" in again.stderr
    assert outcome(scenes.folder / f"{kind}-killed") == outcome(unbroken / kind)
    cards = [
        json.loads((scenes.folder / name / "finetune.json").read_text())["scores"]
        for name in (kind, f"{kind}-killed")
    ]
    assert cards[0] == cards[1]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(scenes, unbroken, kind):
    """Every loss of a training is the same, but for rounding."""
    same = ("--run.precision", "fp32", "--run.length", "4st", "--tune.drop-path", "0")
    command = ("-m", "ssl_vit.evaluate", "finetune", "--config", f"{kind}.yaml")
    made = []
    for world in (1, 2):
        out = ("--run.out", f"{kind}-{world}", "--encoder", "none", *KINDS[kind], *same)
        done = together(scenes, world, *command, *out)
        assert [d.returncode for d in done] == [0] * world, [d.stderr for d in done]
        rows = (scenes.folder / f"{kind}-{world}/metrics.jsonl").read_text().splitlines()
        made.append([row["loss"] for row in map(json.loads, rows) if "loss" in row])
    assert len(made[0]) == 4
    assert made[1] == pytest.approx(made[0], rel=1e-3)


def test_depths_have_their_scale_in_every_part_of_a_source(scenes):
    """Also where the validation images are held out of the training ones."""
    options = (
        "--data.val=",
        "--data.holdout",
        "3",
        "--run.length",
        "2st",
        "--run.precision",
        "fp32",
    )
    done = tuned(scenes, "depth", "--run.out", "parts", *options, "--optim.warmup", "1st")
    assert done.returncode == 0, done.stderr
    rows = (scenes.folder / "parts/metrics.jsonl").read_text().splitlines()
    assert all(0.05 < row["loss"] < 5 for row in map(json.loads, rows) if "loss" in row)
    (score,) = json.loads((scenes.folder / "parts/finetune.json").read_text())["scores"]
    assert 0.1 < score["metrics"]["rmse"] < 6


def test_parts_of_a_batch_teach_what_it_does_together(scenes, tmp_path):
    """Though half of the pixels of some masks have no class."""
    for part in ("train", "val"):
        for folder in ("images", "masks"):
            (tmp_path / part / folder).mkdir(parents=True)
            for i, file in enumerate(sorted((scenes.folder / part / folder).iterdir())):
                image = Image.open(file)
                if folder == "masks" and i % 3 == 0:
                    image.paste(255, (0, 0, 48, 30))
                image.save(tmp_path / part / folder / file.name)
    sets = ("--data.train", f"pairs:{tmp_path}/train", "--data.val", f"pairs:{tmp_path}/val")
    plain = ("--run.precision", "fp32", "--tune.drop-path", "0", "--run.length", "2st")
    losses = []
    for parts in ("1", "3"):
        options = (*sets, *plain, "--optim.accumulate", parts, "--optim.warmup", "1st")
        done = tuned(scenes, "pairs", "--run.out", f"parts-{parts}", *options)
        assert done.returncode == 0, done.stderr
        rows = (scenes.folder / f"parts-{parts}/metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, rows) if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_maps_are_compared_before_training(scenes, tmp_path):
    """Their size, and their classes."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for file in sorted((scenes.folder / "val" / folder).iterdir()):
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    mask = Image.open(tmp_path / "masks/000003.png")
    mask.putpixel((0, 0), 11)
    mask.save(tmp_path / "masks/000003.png")
    val = ("--data.val", f"pairs:{tmp_path}", "--run.out", "never")
    refused(tuned(scenes, "pairs", *val), f"a mask of pairs:{tmp_path} has class 11, those of")
    mask.resize((24, 24)).save(tmp_path / "masks/000003.png")
    refused(tuned(scenes, "pairs", *val), "000003.png has 48x48 pixels, its mask 24x24 (rows x")
    assert not (scenes.folder / "never").exists()


def test_it_learns_and_its_file_opens_as_an_encoder(scenes):
    more = ("--run.length", "40st", "--run.probe-every", "20st", "--optim.lr", "3e-3")
    plain = ("--tune.vertical-flip", "0", "--tune.quarter-turns", "0", "--tune.drop-path", "0")
    done = tuned(scenes, "depth", "--run.out", "learned", *more, *plain)
    assert done.returncode == 0, done.stderr
    folder = scenes.folder / "learned"
    assert Image.open(folder / "depths.png").width > 100
    (score,) = json.loads((folder / "finetune.json").read_text())["scores"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    errors = [row["abs_rel"] for row in rows if "abs_rel" in row]
    assert errors[-1] < 0.85 * errors[0]
    probes = [row["val_delta1"] for row in rows if "val_delta1" in row]
    assert probes[-1] == pytest.approx(score["metrics"]["delta1"], abs=1e-3)
    sets = ("--data.train", "depth:train", "--data.val", "depth:val", "--data.workers", "0")
    judged = scenes(
        "-m",
        *("ssl_vit.evaluate", "depth", "--encoder", str(folder / "model.safetensors"), *sets),
        *("--scale", "0.001", "--epochs", "2", "--out", "depth.json"),
    )
    assert judged.returncode == 0, judged.stderr


@pytest.mark.parametrize(("evaluator", "kind"), [("segment", "pairs"), ("depth", "depth")])
def test_encoders_stand_in_one_table(scenes, unbroken, evaluator, kind):
    encoders = [f"tuned={kind}/model.safetensors", f"random=random:{kind}/model.safetensors"]
    sets = ("--data.train", f"{kind}:train", "--data.val", f"{kind}:val", "--data.workers", "0")
    options = ("--evaluators", evaluator, *sets, "--out", f"compare-{kind}")
    done = scenes("-m", "ssl_vit.evaluate", "compare", "--encoders", *encoders, *options)
    assert done.returncode == 0, done.stderr
    lines = (scenes.folder / f"compare-{kind}/compare.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [
        ["tuned", evaluator],
        ["random", evaluator],
    ]


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("pairs", ("--tune.mixup", "0.8"), "--tune.mixup is 0.8; of pairs:train pixels are"),
        ("pairs", ("--data.val", "depth:val"), "--data.val is 'depth:val'; --data.train is pairs:"),
        ("pairs", ("--segment.ignore", "-2"), "--segment.ignore is -2; a class number, or -1"),
        ("depth", ("--depth.max-depth", "0.0005"), "--depth.max-depth is 0.0005; it must be above"),
        ("depth", ("--depth.scale", "1e-9"), "depth:train: no pixel of its depth maps is deeper"),
        (
            "depth",
            ("--tune.image-size", "30"),
            "--tune.image-size is 30x30; it must be divisible by the patch",
        ),
    ],
)
def test_mistakes_are_told_in_a_line(scenes, kind, options, said):
    refused(tuned(scenes, kind, "--run.out", "never", *options), said)
    assert not (scenes.folder / "never").exists()
