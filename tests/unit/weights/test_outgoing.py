"""Exports: what the other library reads from the file gives our features; or nothing is left."""

import json
import sys
from functools import partial

import onnx
import pytest
import timm
import torch
from torch import nn

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.data.normalize import Normalize
from ssl_vit.model.architecture import timm_kwargs
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights import outgoing, to_huggingface
from ssl_vit.weights.exchange import EncoderInfo, load_encoder, save_encoder
from ssl_vit.weights.outgoing import FORMATS, check_ready, export_encoder, sample_images

CLOSE = {"atol": 1e-4, "rtol": 0}
GIANT = "vit_giant_patch14_reg4_dinov2"
# Rotary positions: with biases of queries and values; with a gated MLP; with two halves of its own.
BIASED, GATED = "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3"
ROTARY = [
    {"arch": BIASED, "image_size": (16, 32)},
    {"arch": GATED, "channels": 5},
    {"arch": "vit_7b_patch16_dinov3", "registers": 0},
    {"arch": BIASED, "rope_periods": (20.0,), "norm_eps": 1e-2, "rope_rescale": 2.0},
]


def make(channels=3, arch="vit_tiny_patch16_224", std=0.3, **changes):
    """A small encoder none of whose tensors is 0, 1 or like another, so that a mistake shows."""
    sizes = {"image_size": (32,), "patch_size": 8, "width": 48, "depth": 2, "heads": 3}
    config = EncoderConfig(arch=arch, **(sizes | changes))
    encoder = Encoder(config, channels).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter.data, std=std, generator=generator)
    mean, std_ = ((0.4, 0.5, 0.6, 0.45, 0.55)[:channels], (0.2, 0.25, 0.3, 0.22, 0.28)[:channels])
    return encoder, EncoderInfo(config, channels, mean, std_, "mae", 7)


def export(made, kind, folder):
    """The export of an encoder under its usual name."""
    out = folder / FORMATS[kind].name
    export_encoder(*made, kind, out, 1.0)
    return out


@torch.no_grad()
def features(encoder):
    """Images, of another number than an exporter traces, with their [CLS] and patch features."""
    shape = (5, encoder.channels, *encoder.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = encoder(images)
    return images, found.cls, found.patches


# --- timm and our own format --------------------------------------------------------------------

SHAPES = [
    {},
    {"image_size": (16, 32)},
    {"channels": 1},
    {"channels": 5},
    {"layer_scale": 0.1, "registers": 3},
    {"arch": GIANT},
    *ROTARY,
]


@pytest.mark.parametrize("changes", SHAPES)
def test_timm_opens_its_file(tmp_path, changes):
    made = make(**changes)
    out = export(made, "timm", tmp_path)
    kwargs = timm_kwargs(made[1].config, made[1].channels)
    if made[1].config.norm_eps:
        kwargs["norm_layer"] = partial(nn.LayerNorm, eps=made[1].config.norm_eps)
    vit = timm.create_model(
        made[1].config.arch, checkpoint_path=str(out), num_classes=0, **kwargs
    ).eval()
    images, cls, patches = features(made[0])
    with torch.no_grad():
        tokens = vit.forward_features(images)
    torch.testing.assert_close(tokens[:, 0], cls, **CLOSE)
    torch.testing.assert_close(tokens[:, vit.num_prefix_tokens :], patches, **CLOSE)
    assert load_encoder(out)[1] == made[1]  # it stays an encoder file of ours


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 5, "registers": 2},
        {"norm_eps": 1e-2},
        {"norm": "pooled", "image_size": (16, 32)},
        {"norm": "pooled", "arch": GATED},
        {"arch": BIASED, "rope_periods": (20.0,), "norm_eps": 1e-2},
    ],
)
def test_timms_printed_line_opens_the_file(tmp_path, changes):
    """As it stands, and with what the encoder has changed of its architecture."""
    made = make(**changes)
    names = {}
    exec(FORMATS["timm"].usage(export(made, "timm", tmp_path), made[1]), names)
    images = features(made[0])[0]
    with torch.no_grad():
        pooled = names["model"](images)  # [CLS], or the mean through its norm
        ours = made[0](images).pool("mean" if "norm" in changes else "cls")
    torch.testing.assert_close(pooled, ours, **CLOSE)


@pytest.mark.parametrize("changes", [{"rope_periods": (1.0, 30.0)}, {"rope_coords": "max"}])
def test_rotary_positions_that_timm_cannot_be_told_are_refused(tmp_path, changes):
    with pytest.raises(
        UserError, match=r"--to timm: its rotary .* one base, .*, not .*--to onnx keep"
    ):
        export(make(arch=BIASED, image_size=(16, 32), **changes), "timm", tmp_path)
    assert not list(tmp_path.iterdir())
    export(make(arch=BIASED, image_size=(16, 32), **changes), "safetensors", tmp_path)


def test_our_own_format_is_what_a_run_writes(tmp_path):
    made = make(layer_scale=0.1)
    save_encoder(tmp_path / "run.safetensors", *made)
    out = export(made, "safetensors", tmp_path)
    assert out.read_bytes() == (tmp_path / "run.safetensors").read_bytes()


# --- ONNX ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (
            {"channels": 5, "image_size": (16, 32), "layer_scale": 0.1, "registers": 3},
            ["cls", "patches"],
        ),
        ({"arch": "vit_base_patch16_siglip_224", "channels": 1}, ["patches"]),
        (
            {
                "arch": f"{GATED}_qkvb",
                "image_size": (16, 32),
                "rope_coords": "min",
                "norm": "pooled",
            },
            ["cls", "patches", "pooled"],
        ),
    ],
)
def test_onnxruntime_opens_its_file(tmp_path, changes, names):
    """By the printed line, with batches of other sizes than the exporter's."""
    made = make(**changes)
    out = export(made, "onnx", tmp_path)
    assert list(tmp_path.iterdir()) == [out]
    images, *_ = features(made[0])
    with torch.no_grad():
        found = made[0](images)
        ours = {"cls": found.cls, "patches": found.patches, "pooled": found.pool("mean")}
    for count in (1, 5):
        space = {"images": images[:count].numpy()}
        exec(FORMATS["onnx"].usage(out, made[1]), space)
        for name, theirs in zip(names, space["found"], strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs), ours[name][:count], **CLOSE)
    session = space["session"]
    assert [o.name for o in session.get_outputs()] == names
    card = session.get_modelmeta().custom_metadata_map
    assert json.loads(card["mean"]) == list(made[1].mean)
    assert json.loads(card["std"]) == list(made[1].std)
    assert json.loads(card["image_size"]) == list(made[0].image_size)
    assert json.loads(card["ssl_vit"])["method"] == "mae"
    check_ready("onnx", out)  # where it may be replaced


# --- a wrong writer leaves nothing --------------------------------------------------------------


def swapped(real):
    """A writer that takes queries for keys."""

    def state(encoder, kind):
        made = real(encoder, kind)
        for key in [k for k in made if ".query." in k]:
            other = key.replace("query", "key")
            made[key], made[other] = made[other], made[key]
        return made

    return state


def without(name, real):
    """A writer that forgets a tensor."""
    return lambda *given: {k: v for k, v in real(*given).items() if k != name}


REAL = to_huggingface.huggingface_state
WRONG = [swapped(REAL), without("encoder.layer.1.attention.attention.key.bias", REAL)]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_wrong_writer_leaves_what_was_there(tmp_path, monkeypatch, wrong, earlier):
    out = tmp_path / "export" / "huggingface"
    if earlier:
        export_encoder(*make(channels=1), "huggingface", out, 1.0)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(to_huggingface, "huggingface_state", wrong)
    with pytest.raises(RunFailed, match=r"features differ|mismatched tensors") as failure:
        export_encoder(*make(), "huggingface", out, 1.0)
    assert "\n" not in str(failure.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert out.parent.exists() == earlier


@pytest.mark.parametrize("kind", ["timm", "safetensors"])
def test_a_file_of_other_weights_is_not_kept(tmp_path, monkeypatch, kind):
    """The written file is read, not the encoder in memory."""
    monkeypatch.setattr(
        outgoing, "save_encoder", lambda path, encoder, info: save_encoder(path, *make(std=0.31))
    )
    with pytest.raises(RunFailed, match=r"features differ \(cls by"):
        export(make(), kind, tmp_path)
    assert not list(tmp_path.iterdir())


def test_features_that_are_no_numbers_are_not_the_same(tmp_path):
    encoder, info = make()
    encoder.vit.norm.bias.data[3] = float("nan")
    with pytest.raises(RunFailed, match="nan"):
        export((encoder, info), "timm", tmp_path)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_sample_images_are_photographs_and_noise_in_the_encoders_statistics(channels):
    encoder, info = make(channels=channels, image_size=(16, 32))
    images = sample_images(encoder, info)
    assert images.shape == (3, channels, 16, 32)
    shown = Normalize(info.mean, info.std).inverse(images)
    assert shown.min() > -1e-6
    assert shown.max() < 1 + 1e-6
    rough = (shown[..., 1:] - shown[..., :-1]).abs().mean((1, 2, 3))
    assert rough[2] > 2 * rough[:2].max()
    assert torch.equal(images, sample_images(encoder, info))


# --- what is there already ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["timm", "huggingface", "safetensors"])
def test_an_earlier_export_is_replaced(tmp_path, kind):
    export(make(channels=1), kind, tmp_path)
    check_ready(kind, tmp_path / FORMATS[kind].name)
    made = make(channels=5)
    out = export(made, kind, tmp_path)
    assert list(tmp_path.iterdir()) == [out]
    images, cls, _ = features(made[0])
    with torch.no_grad():
        torch.testing.assert_close(FORMATS[kind].features(out, images)["cls"], cls, **CLOSE)


def test_an_onnx_file_of_a_strangers_is_left_alone(tmp_path):
    out = tmp_path / "encoder.onnx"
    foreign = onnx.helper.make_model(onnx.helper.make_graph([], "foreign", [], []))
    for content in (b"", b"something else", foreign.SerializeToString()):
        out.write_bytes(content)
        with pytest.raises(UserError, match="is not an export to onnx"):
            check_ready("onnx", out)
    (tmp_path / "new.onnx.data").write_bytes(b"a stranger's")
    with pytest.raises(UserError, match=r"new\.onnx\.data, which exists"):
        check_ready("onnx", tmp_path / "new.onnx")


@pytest.mark.parametrize("kind", ["timm", "huggingface", "safetensors"])
def test_a_strangers_file_is_left_alone(tmp_path, kind):
    suffix = "" if kind == "huggingface" else ".safetensors"
    file, folder = tmp_path / f"file{suffix}", tmp_path / f"folder{suffix}"
    file.write_bytes(b"a stranger's")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for out in (file, folder):
        with pytest.raises(UserError, match=f"is not an export to {kind}; it is not overwritten"):
            check_ready(kind, out)


def test_a_folder_with_something_of_the_users_is_left_alone(tmp_path):
    out = export(make(), "huggingface", tmp_path)
    (out / "README.md").write_text("mine")
    with pytest.raises(UserError, match="not overwritten"):
        check_ready("huggingface", out)


@pytest.mark.parametrize(("kind", "what"), [("timm", ".safetensors"), ("onnx", ".onnx")])
def test_a_name_that_the_other_library_could_not_open_is_refused(tmp_path, kind, what):
    with pytest.raises(UserError, match=rf"a file whose name ends in \{what}"):
        check_ready(kind, tmp_path / "weights.bin")


@pytest.mark.parametrize(
    ("kind", "module", "extra"),
    [("huggingface", "transformers", "hf"), ("onnx", "onnxruntime", "onnx")],
)
def test_a_missing_library_is_named(tmp_path, monkeypatch, kind, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs {module}: pip install 'ssl_vit\[{extra}\]'"):
        check_ready(kind, tmp_path / FORMATS[kind].name)
