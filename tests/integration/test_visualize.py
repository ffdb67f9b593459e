"""The picture door: every picture as a PNG, and a user's mistakes in one line."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from ssl_vit.commands import neighbours
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.model.attention import cls_attention
from ssl_vit.model.encoder import Encoder
from ssl_vit.visualize import main
from ssl_vit.weights.exchange import EncoderInfo, save_encoder
from tests.unit.foreign_weights import noisy, saved, vit

SMALL = {"image_size": (16, 24), "patch_size": 4, "width": 32, "depth": 2, "heads": 2}
ATTENTION = ("-m", "ssl_vit.visualize", "attention")
GOOD = {"--encoder": ("run",), "--images": ("photos/a.png",), "--out": ("refused.png",)}
CELL = 96  # 16 pixels are enlarged six times, 24 to 144


def write_encoder(path, channels=3, arch="vit_tiny_patch16_224", method="mae"):
    torch.manual_seed(0)
    config = EncoderConfig(arch=arch, **SMALL)
    encoder = Encoder(config, channels).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    info = EncoderInfo(config, channels, (0.5,) * channels, (0.25,) * channels, method, 7)
    path.parent.mkdir(exist_ok=True)
    save_encoder(path, encoder, info)
    return encoder


def refused(result, *fragments):
    """One line that says so, no traceback, status 2; lines before it report what went well."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    *before, last = result.stderr.splitlines()
    assert last.startswith("error: ")
    assert all("tensors" in line for line in before)
    for fragment in fragments:
        assert fragment in last
    assert not result.stdout


@pytest.fixture(scope="module")
def room(shared_door):
    """A run folder with an encoder, two photographs, a torn one and a 16-bit one."""
    folder = shared_door.folder
    shared_door.encoder = write_encoder(folder / "run" / "encoder.safetensors")
    write_encoder(folder / "gray" / "encoder.safetensors", channels=1)
    write_encoder(folder / "nocls" / "encoder.safetensors", arch="vit_base_patch16_siglip_224")
    write_encoder(folder / "five" / "encoder.safetensors", channels=5)
    rng = np.random.default_rng(0)
    np.save(folder / "five.npy", rng.integers(0, 255, (16, 24, 5), dtype=np.uint8))
    (folder / "photos").mkdir()
    for name in ("a.png", "b.png"):
        array = rng.integers(0, 255, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / "photos" / name)
    Image.fromarray(array).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    deep = rng.integers(900, 1100, (20, 30), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    return shared_door


def flags(options):
    return [part for name, values in options.items() for part in (name, *values)]


def cell(picture, row, column):
    """A cell of a sheet whose images have one line each."""
    y, x = 16 + row * (CELL + 4), 4 + column * (CELL * 3 // 2 + 4)
    return picture[y : y + CELL, x : x + CELL * 3 // 2]


def test_files(room):
    result = room(*ATTENTION, "--encoder", "run", "--images", "photos/a.png", "photos/b.png")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "attention of 2 images: run/attention-images.png\n"
    assert "tensors, mae at step 7" in result.stderr
    out = room.folder / "run" / "attention-images.png"
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "attention-images.png",
        "encoder.safetensors",
    ]
    with Image.open(out) as image:
        assert image.format == "PNG"
        picture = np.asarray(image)
    assert picture.shape[1] == 6 * (CELL * 3 // 2 + 4) + 4
    for row, name in enumerate(("a.png", "b.png")):
        photo = np.asarray(Image.open(room.folder / "photos" / name))
        shown = cell(picture, row, 0)[3::6, 3::6].astype(int)
        assert np.abs(shown - photo).max() <= 1
        x = (torch.from_numpy(photo.copy()).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
        with torch.no_grad():
            attention, grid = cls_attention(room.encoder, x)
        for head in range(2):
            middle = cell(picture, row, 4 + head)[12::24, 12::24].astype(int).sum(-1)
            most = int(attention[0, head].argmax())
            assert middle.shape == grid
            assert middle.flatten()[most] == middle.max()
    before = out.read_bytes()
    room(*ATTENTION, "--encoder", "run", "--images", "photos/a.png", "photos/b.png")
    assert out.read_bytes() == before


def test_source_count_size_random_and_yaml(room):
    (room.folder / "look.yaml").write_text(
        "encoder: random:gray/encoder.safetensors\nimages: ['digits:val']\nsize: [32]\ncount: 3\n"
    )
    result = room(*ATTENTION, "--config", "look.yaml", "--mass", "0.9")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "attention of 3 images: gray/random-gray-attention-images.png\n"
    with Image.open(room.folder / "gray" / "random-gray-attention-images.png") as image:
        assert image.width == 6 * (CELL + 4) + 4
        assert image.height > 3 * (CELL + 4)


def test_deep_images_are_shown_around_the_mean(room):
    options = ("--encoder", "gray/encoder.safetensors", "--images", "deep.png")
    result = room(*ATTENTION, *options, "--out", "deep-shown.png")
    assert result.returncode == 0, result.stderr
    # All values lie two standard deviations below this encoder's mean, of 0.5 +- 0.25.
    shown = cell(np.asarray(Image.open(room.folder / "deep-shown.png")), 0, 0)
    assert 10 < shown.mean() < 50


def test_unreadable_images_of_a_folder_are_left_out_and_named(room):
    folder = room.folder / "mixed"
    folder.mkdir()
    for name in ("torn.jpg", "photos/a.png"):
        (folder / name.split("/")[-1]).write_bytes((room.folder / name).read_bytes())
    options = ("--encoder", "run", "--images", "flat:mixed", "--out", "mixed.png")
    result = room(*ATTENTION, *options)
    assert result.returncode == 0, result.stderr
    assert "torn.jpg" in result.stderr
    assert "attention of 1 images" in result.stdout


def test_help(room):
    result = room(*ATTENTION, "--help")
    assert result.returncode == 0
    for option in ("--encoder", "--images", "--count", "--size", "--mass", "--out", "--seed"):
        assert option in result.stdout
    short = room("-m", "ssl_vit.visualize", "--help")
    assert short.returncode == 0
    assert "attention" in short.stdout


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--encoder", ""), ("--encoder is missing",)),
        (("--encoder", "nowhere"), ("--encoder is 'nowhere'",)),
        (("--encoder", "nocls"), ("[CLS]",)),
        (("--images",), ("--images is missing",)),
        (("--images", "nowhere.png"), ("'nowhere.png'", "digits", "no", "such a file")),
        (("--images", "photos"), ("'photos'", "folder:photos")),
        (("--images", "folder:nowhere"), ("nowhere",)),
        (("--images", "photos/a.png", "c.png"), ("'c.png'",)),
        (("--images", "photos/a.png", "digits"), ("'digits'", "one source")),
        (("--images", "photos/a.png", "torn.jpg"), ("torn.jpg", "truncated")),
        (("--size", "18"), ("--size is 18x18", "patch size, 4")),
        (("--size", "16", "16", "16"), ("--size is 16 16 16", "one number")),
        (("--size", "-4"), ("--size is -4",)),
        (("--size", "big"), ("--size", "big")),
        (("--mass", "0"), ("--mass is 0;", "at most 1")),
        (("--mass", "60"), ("--mass is 60;", "at most 1")),
        (("--count", "0"), ("--count is 0", "1 or more")),
        (("--out", "picture.jpg"), ("picture.jpg", ".png")),
        (("--out", "nowhere/picture.png"), ("no folder 'nowhere'",)),
        (("--device", "cuda:99"), ("cuda:99",)),
        (("--imags", "x"), ("--imags", "--images")),
    ],
)
def test_refusals(room, monkeypatch, options, fragments):
    """In this process, which is faster than 20 new ones."""
    monkeypatch.chdir(room.folder)
    given = GOOD | {options[0]: options[1:]}
    with pytest.raises(UserError) as refusal:
        main(["attention", *flags(given)])
    message = str(refusal.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    assert not (room.folder / "refused.png").exists()


def test_refusals_at_the_door(room):
    torn = GOOD | {"--images": ("photos/a.png", "torn.jpg")}
    refused(room(*ATTENTION, *flags(torn)), "torn.jpg", "truncated")
    refused(room(*ATTENTION, *flags(GOOD | {"--size": ("18",)})), "--size is 18x18")
    assert not (room.folder / "refused.png").exists()
    assert not list(room.folder.glob(".*.partial"))


def test_other_pictures_are_refused(room):
    refused(room("-m", "ssl_vit.visualize", "atention"), "'atention'", "attention")
    refused(room("-m", "ssl_vit.visualize"), "PICTURE", "attention")


# -- pca


@pytest.mark.parametrize("kind", ["run", "gray", "five", "photos"])
def test_pca(room, monkeypatch, kind):
    """No square, one channel, five channels, one image of one file."""
    monkeypatch.chdir(room.folder)
    images = {"gray": ("digits:val",), "five": ("five.npy", "five.npy")}
    given = images.get(kind, ("photos/a.png", "photos/b.png"))
    encoder = "run" if kind == "photos" else kind
    given = given[:1] if kind == "photos" else given
    rows = {"gray": 3, "photos": 1}.get(kind, 2)
    out = f"pca-{kind}.png"
    assert (
        main(["pca", "--encoder", encoder, "--images", *given, "--count", "3", "--out", out]) == 0
    )
    with Image.open(out) as image:
        picture = np.asarray(image)
    assert picture.shape[1] == 4 * (CELL * 3 // 2 + 4) + 4
    colours = cell(picture, rows - 1, 1)
    squares = colours.reshape(4, 24, 6, 24, 3)
    assert (squares == squares[:, :1, :, :1]).all()  # one colour a patch
    assert colours.std() > 10


# -- neighbours


def test_neighbours_among_others_and_among_themselves(room, monkeypatch, capsys):
    """As the encoder's features say; of digits the first numbers of each class are known."""
    monkeypatch.chdir(room.folder)
    base = ["neighbours", "--encoder", "gray", "--k", "4", "--count", "3", "--size", "16"]
    base += ["--features", "mean"]
    workers, real = [], neighbours.extract
    monkeypatch.setattr(
        neighbours, "extract", lambda *given: workers.append(given[3].workers) or real(*given)
    )
    searched = ["--data.train", "digits:train", "--data.workers", "1"]
    assert main([*base, "--images", "digits:val", *searched, "--out", "n.png"]) == 0
    assert workers == [1, 0]  # of the many, and of the three
    assert main([*base, "--images", "digits:val", "--out", "m.png"]) == 0
    assert (
        main([*base, "--images", "digits:val", "--data.train", "digits:val", "--out", "o.png"]) == 0
    )
    assert "neighbours of 3 images: n.png" in capsys.readouterr().out
    assert (room.folder / "m.png").read_bytes() == (room.folder / "o.png").read_bytes()
    among = {name: np.asarray(Image.open(f"{name}.png")) for name in "nm"}
    assert among["n"].shape == among["m"].shape
    for picture in among.values():
        frames = [
            picture[16 + 50 + row * (CELL + 19), 4 + 100 * c]
            for row in range(3)
            for c in range(1, 5)
        ]
        assert {tuple(f) for f in frames} <= {(0, 114, 178), (230, 120, 0)}


def test_neighbours_are_those_of_the_features(room, monkeypatch):
    """Files, one of which is another's copy: each leaves itself out, by its place."""
    monkeypatch.chdir(room.folder)
    copy = room.folder / "copy.png"
    copy.write_bytes((room.folder / "photos" / "a.png").read_bytes())
    files = ("photos/a.png", "photos/b.png", "copy.png")
    command = ["neighbours", "--encoder", "run", "--images", *files, "--k", "2", "--out", "c.png"]
    assert main(command) == 0
    picture = np.asarray(Image.open("c.png"))
    photos = {f: np.asarray(Image.open(f)) for f in files}
    height = CELL + 19

    def shown(row, column):
        y, x = 16 + row * height, 4 + column * (CELL * 3 // 2 + 4)
        return picture[y : y + CELL, x : x + CELL * 3 // 2][3::6, 3::6]

    def alike(row, column, file):
        return np.abs(shown(row, column).astype(int) - photos[file]).max() <= 1

    assert all(alike(row, 0, file) for row, file in enumerate(files))
    assert alike(0, 1, "copy.png")
    assert alike(0, 2, "photos/b.png")
    assert alike(2, 1, "photos/a.png")
    assert alike(1, 1, "photos/a.png")


@pytest.mark.parametrize(
    ("method", "feature"), [("mae", "mean"), ("dino", "cls"), ("other", "cls")]
)
def test_the_feature_a_method_is_watched_by(room, monkeypatch, method, feature):
    monkeypatch.chdir(room.folder)
    write_encoder(room.folder / f"of-{method}" / "encoder.safetensors", method=method)
    asked = []
    command = ["neighbours", "--encoder", f"of-{method}", "--images", "photos/a.png"]
    monkeypatch.setattr(
        "ssl_vit.commands.neighbours.neighbours_panel",
        lambda *given: (asked.append(given[-1]), np.zeros((4, 4, 3), np.uint8))[1],
    )
    main([*command, "photos/b.png", "--k", "1", "--out", "f.png"])
    assert asked == [f"Nearest neighbours by {feature} features, among 2 images."]


def test_neighbours_of_a_network_that_is_no_vit(room, monkeypatch):
    monkeypatch.chdir(room.folder)
    command = ["--encoder", "random:timm:resnet18", "--images", "photos/a.png", "whole.jpg"]
    small = ["--size", "32", "--out", "resnet.png"]
    assert main(["neighbours", *command, *small, "--k", "1"]) == 0
    for picture in ("attention", "pca"):
        with pytest.raises(UserError, match=f"{picture} shows a plain ViT's tokens"):
            main([picture, *command, "--size", "32", "--out", "refused.png"])
    with pytest.raises(UserError, match="has no decoder"):
        main(["reconstruction", *command, "--out", "refused.png"])
    assert not (room.folder / "refused.png").exists()


# -- reconstruction


@pytest.fixture(scope="module")
def trained(room):
    """A run as the door for pretraining leaves it."""
    small = "--encoder.width 24 --encoder.heads 2 --encoder.depth 1 --method.decoder-width 16"
    small += " --method.decoder-heads 2 --method.decoder-depth 1 --run.length 2st"
    small += " --run.out trained --run.probe-images 50 --data.workers 0 --run.device cpu"
    result = room("-m", "ssl_vit.pretrain", "mae", *small.split())
    assert result.returncode == 0, result.stderr
    return room


def test_reconstruction_of_a_run(trained):
    command = ("-m", "ssl_vit.visualize", "reconstruction", "--encoder", "trained")
    result = trained(*command, "--images", "digits:val", "--count", "2")
    assert result.returncode == 0, result.stderr
    out = "trained/reconstruction-images.png"
    assert result.stdout == f"reconstruction of 2 images: {out}\n"
    assert "the whole method, " in result.stderr
    assert "as given by normalize_target in its config.yaml" in result.stderr
    picture = np.asarray(Image.open(trained.folder / out))
    assert picture.shape[1] == 4 * (CELL + 4) + 4
    original, masked, prediction, pasted = (
        picture[16 : 16 + CELL, 4 + 100 * i : 4 + 100 * i + CELL] for i in range(4)
    )
    hidden = (masked == 128).all(-1)
    assert 0.7 < hidden.mean() < 0.85
    assert (masked[~hidden] == original[~hidden]).all()
    assert (pasted[~hidden] == original[~hidden]).all()
    assert (pasted[hidden] == prediction[hidden]).all()
    assert (pasted[hidden] != original[hidden]).any()


@pytest.mark.parametrize("options", [(), ("--seed", "1"), ("--mask-ratio", "0.5")])
def test_masks_are_seeded(trained, monkeypatch, options):
    monkeypatch.chdir(trained.folder)
    command = ["reconstruction", "--encoder", "trained", "--images", "photos/a.png", *options]
    for name in ("one.png", "two.png"):
        main([*command, "--out", name])
    one, two = (trained.folder / name for name in ("one.png", "two.png"))
    assert one.read_bytes() == two.read_bytes()
    if options:
        main([*command[: -len(options)], "--out", "two.png"])
        assert one.read_bytes() != two.read_bytes()


# -- released weights


@pytest.mark.parametrize("kind", ["dino", "dinov2", "mae", "hugging_face"])
def test_released_weights(tmp_path, monkeypatch, kind):
    """Attention rows as computed here from timm's own tensors, prefix tokens among them."""
    monkeypatch.chdir(tmp_path)
    name, model = released(kind, tmp_path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save("a.png")
    maps = []

    def spied(images, attention, grid, mass):
        maps.append(attention)
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr("ssl_vit.commands.drawing.attention_panel", spied)
    command = ["--encoder", str(name), "--images", "a.png", "--out", "picture.png"]
    assert main(["attention", *command]) == 0
    photo = torch.from_numpy(np.array(Image.open("a.png"))).permute(2, 0, 1)[None] / 255
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if kind == "hugging_face":
        mean = std = (0.5, 0.5, 0.5)
    x = (photo - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    rows = attention_of(model, x)
    assert rows.sum(-1).allclose(torch.ones(()))
    torch.testing.assert_close(maps[0], rows[:, :, model.num_prefix_tokens :], atol=1e-5, rtol=1e-4)
    assert main(["pca", *command]) == 0
    assert main(["neighbours", *command[:2], "--images", "a.png", "a.png", "--k", "1"]) == 0


@torch.no_grad()
def attention_of(model, x):
    """softmax(q k^T / sqrt(d)) of [CLS] in the last block of a timm model, from its weights."""
    tokens = []
    model.blocks[-1].norm1.register_forward_hook(lambda *call: tokens.append(call[2]))
    model.forward_features(x)
    attn = model.blocks[-1].attn
    q, k, _ = F.linear(tokens[0], attn.qkv.weight, attn.qkv.bias).chunk(3, dim=-1)
    q, k = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (q, k))
    return (q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[:, :, 0]


def released(kind, folder):
    """A small file in the format of a release, and timm's model with the same weights."""
    if kind == "dinov2":
        model = noisy(timm.create_model("vit_small_patch14_reg4_dinov2", **SMALL_DINOV2), 0.1)
        state = {
            k.replace("reg_token", "register_tokens"): v for k, v in model.state_dict().items()
        }
        first = torch.zeros(1, 1, model.embed_dim)
        state["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
        state["mask_token"] = torch.zeros(1, model.embed_dim)
        return saved(state, folder), model
    model = noisy(vit(num_classes=0), 0.1)
    with torch.no_grad():
        model.pos_embed[:, 0] = 0
    state = dict(model.state_dict())
    if kind == "dino":
        return saved(
            {"teacher": {f"module.backbone.{k}": v for k, v in state.items()}}, folder
        ), model
    if kind == "mae":
        return saved({"model": state}, folder), model
    hugging_face(state, folder / "hf")
    return folder / "hf", model


def hugging_face(state, folder):
    """The same ViT as a folder of Hugging Face's, with the long-standing names of its tensors."""
    names = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    names |= {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc2": "output.dense"}
    names |= {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense"}
    theirs = {"embeddings.cls_token": state["cls_token"]}
    theirs["embeddings.position_embeddings"] = state["pos_embed"]
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        block = re.match(r"blocks\.(\d+)\.(.*)", module)
        start = f"encoder.layer.{block[1]}." if block else ""
        inner = block[2] if block else module
        if inner == "attn.qkv":
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                theirs[f"{start}attention.attention.{part}.{kind}"] = rows.clone()
        elif inner in names:
            theirs[f"{start}{names[inner]}.{kind}"] = value
    folder.mkdir()
    save_file(theirs, folder / "model.safetensors")
    config = {"model_type": "vit", "num_attention_heads": 3, "layer_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config))


SMALL_DINOV2 = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 0}


# -- mistakes


@pytest.mark.parametrize(
    ("picture", "options", "fragments"),
    [
        ("neighbours", ("--k", "-1"), ("--k is -1; it must be 0 or more",)),
        ("neighbours", ("--k", "2"), ("--k is 2", "are 1 besides")),
        ("neighbours", ("--k", "many"), ("--k", "many")),
        ("neighbours", ("--gallery", "0"), ("--gallery is 0; it must be 1 or more",)),
        ("neighbours", ("--data.train", "nowhere"), ("--data.train", "'nowhere'")),
        ("neighbours", ("--k", "3", "--data.train", "flat:photos"), ("--k is 3", "are 2")),
        ("neighbours", ("--features", "max"), ("--features is 'max'", "cls, mean")),
        ("neighbours", ("--images", "photos/a.png", "torn.jpg"), ("torn.jpg", "truncated")),
        ("neighbours", ("--images", "none.png"), ("'none.png'",)),
        ("neighbours", ("--images", "photos/a.png"), ("--k is 1", "are 0 besides")),
        ("pca", ("--images", "photos/a.png", "none.png"), ("'none.png'",)),
        ("pca", ("--images", "torn.jpg"), ("torn.jpg", "truncated")),
        ("pca", ("--encoder", "five"), ("a.png", "5")),
        ("pca", ("--encoder", "pixels:run"), ("pixels:run", "plain ViT")),
        ("reconstruction", ("--mask-ratio", "1"), ("--mask-ratio is 1.0",)),
        ("reconstruction", ("--target", "colours"), ("--target", "colours")),
        ("reconstruction", ("--encoder", "run"), ("'run'", "no checkpoints")),
        ("reconstruction", ("--encoder", "random:run"), ("'random:run'", "no decoder")),
        ("reconstruction", ("--images", "torn.jpg"), ("'run'",)),
    ],
)
def test_refusals_of_the_others(room, monkeypatch, picture, options, fragments):
    monkeypatch.chdir(room.folder)
    given = GOOD | (
        {"--images": ("photos/a.png", "photos/b.png")} if picture == "neighbours" else {}
    )
    given |= {options[0]: options[1:]}
    with pytest.raises(UserError) as refusal:
        main([picture, *flags(given)])
    message = str(refusal.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    assert not (room.folder / "refused.png").exists()
