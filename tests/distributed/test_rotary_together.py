"""Rotary encoders in two processes, sharded or with adapters: what one does, augmented coordinates
included."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ssl_vit import pretrain
from ssl_vit.weights.exchange import EncoderInfo, save_encoder
from tests.contract import tiny
from tests.distributed.together import together
from tests.integration.conftest import Door

# SwiGLU, biases, storage tokens. The small scale of layers that DINOv3 begins with would hide what
# attention does. Kept patches turn by their own places (MAE), crops of two sizes apart (DINO).
ROTARY = ("--encoder.arch", "vit_small_plus_patch16_dinov3_qkvb", "--encoder.layer-scale", "1")
AUGMENTED = ("--encoder.rope-shift", "0.5", "--encoder.rope-jitter", "1.5")
AUGMENTED += ("--encoder.rope-rescale", "2")
LOCAL = ("--method.local-crops", "2", "--method.local-size", "8")
OPTIONS = {"mae": ROTARY, "dino": (*ROTARY, *LOCAL)}
RUNS = {name: tiny.run_arguments(name, *more, *AUGMENTED) for name, more in OPTIONS.items()}
# Adapters of rank 3 and a head, from the first step on, in parts of a batch; they are not sharded.
LORA = ("--init.lora", "3", "--optim.freeze-encoder", "0st", "--optim.release", "0st")
LORA += ("--optim.lr", "1e-3", "--optim.accumulate", "2")
# All runs, in processes that meet once.
PAIR = """
import json, sys
from ssl_vit import pretrain
from ssl_vit.training.parallel import stop_parallel

for name, arguments in json.loads(sys.argv[1]).items():
    way = "ddp" if "--init.lora" in arguments else "fsdp"
    pretrain.main([*arguments, "--run.parallel", way, "--run.out", f"{name}-two"])
stop_parallel()
"""


def adapting(folder: Path) -> tuple[str, ...]:
    """Options that adapt the encoder in a file there."""
    return (*OPTIONS["dino"], "--init.encoder", str(folder / "given.safetensors"), *LORA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, of one process and of two."""
    door = Door(tmp_path_factory.mktemp("rotary"))
    (door.folder / "pair.py").write_text(PAIR)
    given = tiny.session("dino", *OPTIONS["dino"]).task.exported_encoder()
    about = EncoderInfo(given.config, 1, (0.3,), (0.4,))
    save_encoder(door.folder / "given.safetensors", given, about)
    runs = RUNS | {"adapters": tiny.run_arguments("dino", *adapting(door.folder))}
    done = together(door, 2, "pair.py", json.dumps(runs))
    assert [process.returncode for process in done] == [0, 0], [p.stderr for p in done]
    for name, arguments in runs.items():
        assert pretrain.main([*arguments, "--run.out", str(door.folder / name)]) == 0
    return door.folder


@pytest.mark.parametrize("name", RUNS)
def test_two_sharded_processes_are_one(folder, name):
    """The same losses and gradients; every weight moves alike, the teacher's too."""
    one, two = folder / name, folder / f"{name}-two"
    for a, b in zip(tiny.losses(one), tiny.losses(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    task = tiny.session(name, *OPTIONS[name], "--encoder.drop-path", "0.2").task
    tiny.assert_same_training(tiny.state(task), tiny.weights(one), tiny.weights(two))
    files = [load_file(run / "encoder.safetensors") for run in (one, two)]
    first = tiny.state(task.exported_encoder().vit)
    assert any(key.endswith(".attn.q_bias") for key in first)
    tiny.assert_same_training(first, *files)


def test_adapters_in_two_processes_are_those_of_one(folder):
    """The same losses and gradients; factors, heads, teacher and the encoder move alike."""
    one, two = folder / "adapters", folder / "adapters-two"
    for a, b in zip(tiny.losses(one), tiny.losses(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    first = tiny.state(tiny.session("dino", *adapting(folder)).task)
    assert sum(key.startswith("adapters.up.") for key in first) == 2 * 5  # of both blocks
    tiny.assert_same_training(first, tiny.weights(one), tiny.weights(two))
    files = [load_file(run / "encoder.safetensors") for run in (one, two)]
    tiny.assert_same_training(load_file(folder / "given.safetensors"), *files)


@pytest.mark.parametrize("name", RUNS)
def test_augmentation_is_at_work(folder, name):
    """Without it the first loss is another, by more than two processes may differ."""
    plain = tiny.session(name, *OPTIONS[name], "--encoder.drop-path", "0.2")
    loss = tiny.train(plain, 1)[0]["loss"]
    assert abs(loss / tiny.losses(folder / name)[0]["loss"] - 1) > 3e-4
