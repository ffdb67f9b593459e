"""The export door: other libraries' files from a run folder, and a user's mistakes in one line."""

import pytest
import timm
import torch
from transformers import AutoModel

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.export import main
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights import to_huggingface
from ssl_vit.weights.exchange import EncoderInfo, load_encoder, save_encoder

EXPORT = ("-m", "ssl_vit.export")
SMALL = {"image_size": (16, 24), "patch_size": 4, "width": 32, "depth": 2, "heads": 2}


def write_run(folder, **changes):
    """A run folder with a small encoder, none of whose tensors is 0 or 1."""
    config = EncoderConfig(arch="vit_tiny_patch16_224", **(SMALL | changes))
    encoder = Encoder(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3, generator=generator)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("run: {}\n")
    info = EncoderInfo(config, 3, (0.5,) * 3, (0.25,) * 3, "mae", 7)
    save_encoder(folder / "encoder.safetensors", encoder, info)
    return encoder


@torch.no_grad()
def differs(encoder, tokens_of):
    """The largest difference of our [CLS] and patches to the tokens of the other library."""
    images = torch.randn(5, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    found = encoder(images)
    return (torch.cat([found.cls[:, None], found.patches], 1) - tokens_of(images)).abs().max()


@pytest.fixture(scope="module")
def room(shared_door):
    """A run folder with an encoder."""
    shared_door.encoder = write_run(shared_door.folder / "run")
    return shared_door


def test_a_runs_encoder_becomes_timms(room):
    result = room(*EXPORT, "--encoder", "run", "--to", "timm")
    assert result.returncode == 0, result.stderr
    first, second, line = result.stdout.splitlines()
    out = room.folder / "run" / "export" / "timm.safetensors"
    assert first.startswith(f"timm: {out}, 0.")
    assert second.startswith("read back, features differ by at most: cls ")
    assert list(out.parent.iterdir()) == [out]
    names: dict[str, timm.models.VisionTransformer] = {}
    exec(line, names)
    assert differs(room.encoder, names["model"].forward_features) < 1e-4


def test_a_runs_encoder_becomes_transformers(room):
    """And then an official-looking folder becomes an encoder of ours."""
    result = room(*EXPORT, "--encoder", "run", "--to", "huggingface", "--out", "hub")
    assert result.returncode == 0, result.stderr
    assert "AutoModel.from_pretrained('hub')" in result.stdout
    assert "warn" not in result.stderr.lower()
    model = AutoModel.from_pretrained(room.folder / "hub").eval()
    assert differs(room.encoder, lambda images: model(images).last_hidden_state) < 1e-4
    assert main(["--encoder", str(room.folder / "hub"), "--to", "safetensors"]) == 0
    ours, info = load_encoder(room.folder / "hub" / "export" / "encoder.safetensors")
    assert differs(room.encoder, lambda images: joined(ours(images))) < 1e-4
    assert info.std == (0.25,) * 3


def joined(found):
    """[CLS] and patches as tokens."""
    return torch.cat([found.cls[:, None], found.patches], 1)


def test_a_wrong_mapping_fails_and_leaves_nothing(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    names = to_huggingface._VIT
    swapped = names | {"norm1": names["norm2"], "norm2": names["norm1"]}
    monkeypatch.setattr(to_huggingface, "_VIT", swapped)
    with pytest.raises(RunFailed, match=r"read back, features differ \(cls by \d"):
        main(["--encoder", str(tmp_path / "run"), "--to", "huggingface"])
    assert not (tmp_path / "run" / "export").exists()


FAILS = """
import sys
from ssl_vit.commands import cli
from ssl_vit import export
from ssl_vit.weights import to_huggingface
to_huggingface._VIT["norm1"], to_huggingface._VIT["norm2"] = "layernorm_after", "layernorm_before"
cli.run_door(export.main)
"""


def test_such_a_failure_is_one_line_and_status_1(room):
    (room.folder / "fails.py").write_text(FAILS)
    result = room("fails.py", "--encoder", "run", "--to", "huggingface", "--out", "wrong")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("stopped: huggingface export: read back, ")
    assert "Traceback" not in result.stderr
    assert not result.stdout
    assert not list(room.folder.glob("*wrong*"))


def test_a_mistake_is_one_line_and_status_2(room):
    result = room(*EXPORT, "--encoder", "run", "--to", "tim")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: command line: ")
    assert line.endswith(
        "--to is 'tim'; it must be one of timm, huggingface, onnx, safetensors "
        "(nearest known: timm)"
    )


def contents(folder):
    """All that is in a folder, as bytes."""
    return {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--encoder": ""}, "--encoder is missing"),
        ({"--to": ""}, "--to is missing"),
        ({"--to": "pickle"}, "--to is 'pickle'; it must be one of timm, huggingface"),
        ({"--encoder": "{room}/nothing"}, "nothing'; no such file"),
        ({"--out": "{room}/no/where.safetensors"}, "where.safetensors'; there is no folder"),
        ({"--out": "{room}/weights.pth"}, "writes a file whose name ends in .safetensors"),
        ({"--out": "{room}/strange.safetensors"}, "exists and is not an export to timm"),
        (
            {"--to": "huggingface", "--out": "{room}/run"},
            "exists and is not an export to huggingface",
        ),
        ({"--out": "{room}/run/encoder.safetensors"}, "which is the encoder to export"),
        ({"--out": "{room}/other/encoder.safetensors"}, "the encoder file of a run"),
        ({"--encoder": "{room}/registers", "--to": "huggingface"}, "has register tokens and sizes"),
        ({"--colour": "red"}, "unknown option '--colour'"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_left(room, change, message):
    write_run(room.folder / "other")
    write_run(room.folder / "registers", registers=2)
    (room.folder / "strange.safetensors").write_bytes(b"a stranger's")
    given = {"--encoder": "{room}/run", "--to": "timm"} | change
    argv = [x.format(room=room.folder) for pair in given.items() for x in pair]
    before = contents(room.folder)
    with pytest.raises(UserError) as refusal:
        main(argv)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert contents(room.folder) == before
