"""DINOv3 in the files of three libraries: the same weights give the same features."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from ssl_vit.common.config import EncoderConfig
from ssl_vit.evaluators.backbone import open_backbone
from ssl_vit.model.architecture import without_memory
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import EncoderInfo, load_encoder, save_encoder
from ssl_vit.weights.grids import Hints
from ssl_vit.weights.keymaps import to_timm
from ssl_vit.weights.official import open_weights, weights_info
from ssl_vit.weights.rotary_shapes import infer_rotary
from tests.parity.golden import GOLDEN
from tests.unit.foreign_weights import IMAGENET, agree, counted, images, noisy, refused, saved

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 128, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
SIZES |= {"num_register_tokens": 4, "pos_embed_rescale": None}
MLP = SIZES | {"intermediate_size": 512, "num_hidden_layers": 3}
GATED = SIZES | {"intermediate_size": 512, "num_hidden_layers": 2, "use_gated_mlp": True,
                 "hidden_act": "silu"}  # fmt: skip
WITHOUT_BIASES = GATED | {"intermediate_size": 256, "query_bias": False, "value_bias": False}
CASES = {"dinov3_vit_mlp": MLP, "dinov3_vit_swiglu": GATED, "dinov3_vit_7blike": WITHOUT_BIASES}
SIZE = (32, 48)


def names(case):
    path = GOLDEN / "dinov3_names.json"
    if not path.is_file():
        pytest.skip(f"no recorded names at {path}")
    return json.loads(path.read_text())[case]


def hugging_face(case, biases=True, **changes):
    """A random model of transformers, and its features of images that are not square."""
    model = noisy(
        transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**CASES[case], **changes))
    )
    if not biases:
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.bias", "v_proj.bias")):
                parameter.data.zero_()
    with torch.inference_mode():
        return model, model(images(SIZE)).last_hidden_state


def official(case, state, keys=0.0, mask=True):
    """Official names for a Hugging Face state dict, by the recorded map. ``keys``: their bias."""
    made = {"rope_embed.periods": 100.0 ** (torch.arange(16) / 16)}
    made["rope_embed.periods"] = made["rope_embed.periods"].bfloat16().float()
    width = state["embeddings.cls_token"].shape[-1]
    for ours, theirs, _ in names(case):
        name, _, part = ours.partition("[")
        if theirs != "-":
            tensor = state[theirs].reshape(-1, width) if ours == "mask_token" else state[theirs]
            made.setdefault(name, []).append(tensor) if part else made.update({name: tensor})
        elif part.startswith("k"):
            made[name].append(torch.full((width,), keys))
        elif name.endswith("bias_mask") and mask:
            made[name] = torch.ones(3 * width)
            made[name][width : 2 * width] = 0
    return {k: torch.cat(v) if isinstance(v, list) else v for k, v in made.items()}


def timms(case, state):
    """timm's names, by the recorded map."""
    made = {}
    for _, theirs, name in names(case):
        if "-" not in (theirs, name):
            made.setdefault(name, []).append(state[theirs])
    return {k: torch.cat(v) for k, v in made.items()}


def in_file(model, tmp_path):
    """Tensors as they are in a file of Hugging Face's."""
    model.save_pretrained(tmp_path / "huggingface")
    return load_file(tmp_path / "huggingface" / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_three_libraries_agree(tmp_path, case):
    """Of files of the same random weights: transformers' features, timm's, and ours of each."""
    model, tokens = hugging_face(case)
    state = in_file(model, tmp_path)
    eva = timms(case, state)
    opened = {
        "DINOv3 (official)": open_weights(saved(official(case, state), tmp_path, "d.pth")),
        "Hugging Face DINOv3ViT": open_weights(tmp_path / "huggingface"),
        "timm": open_weights(saved(eva, tmp_path, "timm.pth")),
    }
    for name, found in opened.items():
        assert found.format == name
        agree(found, tokens, SIZE, prefix=5)
        assert found.report.startswith(counted(found))
    configs = [found.info.config for found in opened.values()]
    config = configs[0]
    assert {c.arch for c in configs} == {config.arch}
    assert config.arch.endswith("_qkvb") == (case != "dinov3_vit_7blike")
    sizes = {"embed_dim": 128, "depth": len(model.model.layer), "num_heads": 2, "patch_size": 8}
    theirs = timm.create_model(config.arch, num_classes=0, img_size=SIZE, **sizes).eval()
    theirs.load_state_dict(eva, strict=True)
    with torch.inference_mode():
        found = theirs.forward_features(images(SIZE))
    torch.testing.assert_close(found, tokens, atol=1e-5, rtol=1e-5)
    assert f"taken for {config.arch} by its shapes" in opened["timm"].report
    assert "; left out: mask_token 1; mean" in opened["Hugging Face DINOv3ViT"].report
    for name in (tmp_path / "d.pth", tmp_path / "huggingface", tmp_path / "timm.pth"):
        assert weights_info(name)[0] == open_weights(name).info


@pytest.mark.parametrize("names_in", ["file", "memory"])
@pytest.mark.parametrize("case", CASES)
def test_hugging_face(tmp_path, case, names_in):
    """With what its configuration tells: epsilon, base of the periods, heads, statistics."""
    model, tokens = hugging_face(case, layer_norm_eps=1e-2, rope_theta=20.0)
    in_file(model, tmp_path)
    folder = tmp_path / "huggingface"
    if names_in == "memory":
        (folder / "model.safetensors").unlink()
        state = model.state_dict()
        assert any(k.startswith("model.layer.") for k in state)
        saved(state, folder, "pytorch_model.bin")
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    opened = open_weights(folder)
    agree(opened, tokens, SIZE, prefix=5)
    config = opened.info.config
    assert (config.norm_eps, config.rope_periods, config.heads) == (1e-2, (20.0,), 2)
    assert (opened.info.mean, opened.info.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert opened.info.method == "dinov3"


def test_hugging_face_without_registers(tmp_path):
    model = noisy(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(
        **MLP | {"num_register_tokens": 0})))  # fmt: skip
    in_file(model, tmp_path)
    with torch.inference_mode():
        agree(open_weights(tmp_path / "huggingface"), model(images(SIZE)).last_hidden_state, SIZE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, r"config.json: hidden_act is 'relu'; it must be gelu"),
        ({"rope_theta": 0}, "config.json: heads 2, epsilon 1e-05, rope_theta 0, image size 32"),
        ({"num_attention_heads": "2"}, "config.json: heads 2, epsilon"),
        ({"num_attention_heads": 3}, "its width is 128, whose attention heads are unknown"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, changes, message):
    in_file(hugging_face("dinov3_vit_mlp")[0], tmp_path)
    path = tmp_path / "huggingface" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(path.parent, message)


# -- biases


@pytest.mark.parametrize("kind", ["official", "huggingface", "timm"])
def test_biases_that_are_zero_need_no_place(tmp_path, kind):
    """As in the distilled files: timm's plain architecture. Its own files are as they are."""
    case = "dinov3_vit_mlp"
    model, tokens = hugging_face(case, biases=False)
    state = in_file(model, tmp_path)
    name = tmp_path / "huggingface"
    if kind != "huggingface":
        made = official(case, state) if kind == "official" else timms(case, state)
        name = saved(made, tmp_path)
    opened = open_weights(name)
    agree(opened, tokens, SIZE, prefix=5)
    assert opened.info.config.arch.endswith("_qkvb") == (kind == "timm")
    said = "; the biases of queries and values are zero, and left out" in opened.report
    assert said == (kind != "timm")
    assert weights_info(name)[0] == opened.info


@pytest.mark.parametrize("mask", ["zero", "nan"])
@pytest.mark.parametrize("keys", [0.0, 3.0, float("nan")])
def test_the_bias_of_keys_is_masked(tmp_path, mask, keys):
    """Whatever it is, and where the mask was never set, as in an untrained official network."""
    case = "dinov3_vit_mlp"
    model, tokens = hugging_face(case)
    state = official(case, in_file(model, tmp_path), keys)
    if mask == "nan":
        state = {k: torch.full_like(v, torch.nan) if "mask" in k and "bias" in k else v
                 for k, v in state.items()}  # fmt: skip
    agree(open_weights(saved(state, tmp_path)), tokens, SIZE, prefix=5)


def test_a_bias_of_keys_that_counts_is_refused(tmp_path):
    """It turns with its patch, so that no other weight can stand for it."""
    case = "dinov3_vit_mlp"
    state = in_file(hugging_face(case)[0], tmp_path)
    message = r"blocks\.0\.attn\.qkv\.bias is not zero for keys, for which timm's network has no"
    refused(saved(official(case, state, 0.1, mask=False), tmp_path), message)
    open_weights(saved(official(case, state, 0.0, mask=False), tmp_path))
    biased = hugging_face(case, key_bias=True)[0]
    in_file(biased, tmp_path)
    refused(tmp_path / "huggingface", r"attention\.k_proj\.bias is not zero for keys")


# -- periods


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize(
    ("periods", "expected", "said"),
    [
        ([100 ** (i / 16) for i in range(16)], (100.0,), ""),
        ([20 ** (i / 16) for i in range(16)], (20.0,), "its rotary periods have the base 20"),
        (
            [0.5 * 1.2**i for i in range(16)],
            (0.5, 0.5 * 1.2**15),
            "its rotary periods are 0.5 to 7",
        ),
    ],
)
def test_periods_are_checked(tmp_path, periods, expected, said, rounded):
    case = "dinov3_vit_mlp"
    state = official(case, in_file(hugging_face(case)[0], tmp_path))
    given = torch.tensor(periods)
    state["rope_embed.periods"] = given.bfloat16().float() if rounded else given
    opened = open_weights(saved(state, tmp_path))
    assert opened.info.config.rope_periods == pytest.approx(expected, rel=2**-8)
    assert said in opened.report if said else "periods" not in opened.report.replace("rope_", "")
    found = torch.tensor(opened.encoder.rope.all_periods())
    torch.testing.assert_close(found, given, rtol=2**-7, atol=0)


@pytest.mark.parametrize("periods", [[1.0, 5.0, 2.0, 3.0] * 4, [0.0] * 16, [float("nan")] * 16])
def test_other_periods_are_refused(tmp_path, periods):
    case = "dinov3_vit_mlp"
    state = official(case, in_file(hugging_face(case)[0], tmp_path))
    state["rope_embed.periods"] = torch.tensor(periods)
    refused(saved(state, tmp_path), r"rope_embed\.periods are .*; they must have a constant ratio")


# -- official files as they are found


def test_the_teacher_of_a_training(tmp_path):
    """Of student, teacher, and the teacher of Gram anchoring; heads and norms of crops left out."""
    case = "dinov3_vit_mlp"
    model, tokens = hugging_face(case)
    own = official(case, in_file(model, tmp_path))
    other = {k: v + 1 for k, v in own.items()}
    content = {}
    for who in ("gram_teacher", "student", "teacher"):
        content |= {
            f"{who}.backbone.{k}": v for k, v in (own if who == "teacher" else other).items()
        }
    content |= {"teacher.dino_head.mlp.0.weight": torch.ones(2)}
    content |= {"teacher.backbone.local_cls_norm.weight": torch.ones(128)}
    opened = open_weights(saved({"model": content, "iteration": 3}, tmp_path))
    agree(opened, tokens, SIZE, prefix=5)
    assert "local_cls_norm 1, mask_token 1, rope_embed 1, student" in opened.report
    assert "teacher.dino_head 1" in opened.report
    taken = "; teacher.backbone is taken, not gram_teacher.backbone, student.backbone"
    assert taken in opened.report


def test_satellite_weights_have_statistics_of_their_own(tmp_path):
    case = "dinov3_vit_mlp"
    state = official(case, in_file(hugging_face(case)[0], tmp_path))
    usual = open_weights(saved(state, tmp_path, "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth"))
    other = open_weights(saved(state, tmp_path, "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"))
    assert (usual.info.mean, usual.info.std) == IMAGENET
    assert other.info.mean == timm.get_pretrained_cfg("vit_large_patch16_dinov3.sat493m").mean
    assert other.info.mean != usual.info.mean


@pytest.mark.parametrize(
    ("form", "name", "shape", "message"),
    [
        ("official", "blocks.0.attn.qkv.bias", (385,), r"blocks\.0\.attn\.qkv\.bias is \(385,\)"),
        ("official", "blocks.2.attn.qkv.bias_mask", (), r"blocks\.2\.attn\.qkv\.bias_mask is \(\)"),
        ("official", "rope_embed.periods", (1, 16), r"rope_embed\.periods is \(1, 16\); expected"),
        ("official", "storage_tokens", (4, 128), r"reg_token is \(4, 128\); expected \(1, regis"),
        ("official", "patch_embed.proj.weight", (), r"patch_embed\.proj\.weight is \(\); expected"),
        ("official", "blocks.0.mlp.fc1.weight", (513, 128), "timm has no DINOv3 of width 128 with"),
        ("official", "blocks.1.ls1.gamma", (129,), r"blocks\.1\.gamma_1 is \(129,\) for \(128,\)"),
        ("hf", "layer.0.attention.k_proj.weight", (129, 128), "have shapes .* must be equal"),
        ("hf", "embeddings.register_tokens", (4, 1, 128), r"reg_token is \(4, 1, 128\)"),
        ("timm", "blocks.1.attn.proj.weight", (128, 64), r"attn\.proj\.weight is \(128, 64\) for"),
    ],
)
def test_a_tensor_of_another_shape_is_named(tmp_path, form, name, shape, message):
    case = "dinov3_vit_mlp"
    state = in_file(hugging_face(case)[0], tmp_path)
    state = {"official": official, "timm": timms, "hf": lambda _, own: own}[form](case, state)
    assert name in state
    refused(saved({**state, name: torch.ones(shape)}, tmp_path), message)


def test_values_that_are_no_numbers_are_named(tmp_path):
    """But for the masked bias of keys, of which nothing is used."""
    case = "dinov3_vit_mlp"
    state = official(case, in_file(hugging_face(case)[0], tmp_path))
    state["blocks.1.attn.qkv.bias"][-1] = torch.nan
    refused(
        saved(state, tmp_path), r"1 of \d+ tensors have values .* \(NaN\): blocks\.1\.attn\.v_b"
    )


# -- the released sizes

# Width, heads, blocks, features within an MLP, whether it is gated: of the released networks.
SIZED = {
    "vit_small_patch16_dinov3_qkvb": (384, 6, 12, 1536, False),
    "vit_small_plus_patch16_dinov3_qkvb": (384, 6, 12, 1536, True),
    "vit_base_patch16_dinov3_qkvb": (768, 12, 12, 3072, False),
    "vit_large_patch16_dinov3_qkvb": (1024, 16, 24, 4096, False),
    "vit_huge_plus_patch16_dinov3_qkvb": (1280, 20, 32, 5120, True),
    "vit_7b_patch16_dinov3": (4096, 32, 40, 8192, True),
}


def of_every_block(case, depth):
    """The recorded names of a network of so many blocks, each as the first one."""
    first = [row for row in names(case) if row[0].startswith("blocks.0.")]
    blocks = [
        [name.replace("blocks.0.", f"blocks.{i}.").replace("layer.0.", f"layer.{i}.")
         for name in row]
        for i in range(depth) for row in first
    ]  # fmt: skip
    return blocks + [row for row in names(case) if not row[0].startswith("blocks.")]


@pytest.mark.parametrize("arch", SIZED)
def test_names_and_shapes_of_the_released_sizes(monkeypatch, arch):
    """Of official, Hugging Face's and timm's files, whole, without memory: all of ours, no more."""
    width, heads, depth, hidden, gated = SIZED[arch]
    case = "dinov3_vit_swiglu" if gated else "dinov3_vit_mlp"
    biased = arch.endswith("_qkvb")
    recorded = of_every_block(case if biased else "dinov3_vit_7blike", depth)
    config = transformers.DINOv3ViTConfig(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=depth,
        intermediate_size=hidden, use_gated_mlp=gated, hidden_act="silu" if gated else "gelu",
        query_bias=biased, value_bias=biased, num_register_tokens=4)  # fmt: skip
    with torch.device("meta"):
        model = transformers.DINOv3ViTModel(config).state_dict()
        ours = Encoder(EncoderConfig(arch)).vit.state_dict()
    # What biases hold decides on the architecture.
    state = {
        k.removeprefix("model."): torch.ones(v.shape) if k.endswith("_proj.bias") else v
        for k, v in model.items()
    }
    monkeypatch.setitem(globals(), "names", lambda case: recorded)
    files = {"DINOv3 (official)": official(case, state), "timm": timms(case, state)}
    for form, file in (*files.items(), ("Hugging Face DINOv3ViT", state)):
        mapped = to_timm("", file, "a file")
        assert mapped.format == form
        shapes = {name: tuple(tensor.shape) for name, tensor in mapped.state.items()}
        assert shapes == {name: tuple(tensor.shape) for name, tensor in ours.items()}
        found = infer_rotary(mapped.state, "a file", Hints()).config
        assert found == EncoderConfig(arch)


RELEASED = [
    "vit_tiny_patch16_dinov3_qkvb",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_dinov3_qkvb",
    "vit_small_plus_patch16_dinov3",
    "vit_small_plus_patch16_dinov3_qkvb",
    "vit_base_patch16_dinov3",
    "vit_large_patch16_dinov3_qkvb",
    "vit_huge_plus_patch16_dinov3",
    "vit_7b_patch16_dinov3",
]


@pytest.mark.parametrize("arch", RELEASED)
def test_released_architectures_are_known_by_their_shapes(arch):
    """Whole, without memory: nothing of timm's architecture is changed."""
    with without_memory():
        state = timm.create_model(arch, num_classes=0).state_dict()
    found = infer_rotary(state, "a file", Hints())
    assert (found.config, found.channels) == (EncoderConfig(arch), 3)


def test_an_mlp_that_timm_has_not(tmp_path):
    model = noisy(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(
        **SIZES, intermediate_size=300, num_hidden_layers=1)))  # fmt: skip
    in_file(model, tmp_path)
    message = (
        r"timm has no DINOv3 of width 128 with blocks.0.mlp.fc1.weight \(300, 128\) and biases"
    )
    refused(tmp_path / "huggingface", message)


# -- ours, and timm's by name


def test_timms_by_name(tmp_path):
    arch = "vit_small_patch16_dinov3_qkvb"
    model = noisy(timm.create_model(arch, num_classes=5, embed_dim=64, depth=1, num_heads=1))
    path = saved(model.state_dict(), tmp_path)
    opened = open_weights(f"timm:{arch}.lvd1689m:{path}")
    agree(opened, model.forward_features(images((256, 256))), (256, 256), prefix=5)
    assert opened.report == f"{counted(opened)}; left out: head 2"
    assert weights_info("timm:vit_small_patch16_dinov3")[0].config.arch == arch.removesuffix(
        "_qkvb"
    )
    backbone = open_backbone(f"random:timm:{arch}", 0)
    assert isinstance(backbone.module, Encoder)


def test_timms_own_forward_of_ours(tmp_path):
    """What is in no file (the bias of keys, tables of rotary positions) is not left to chance."""
    config = EncoderConfig("vit_small_patch16_dinov3_qkvb", (224,), 16, 64, 2, 1)
    encoder = noisy(Encoder(config))
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoder, EncoderInfo(config, 3, *IMAGENET))
    for _ in range(3):
        junk = [torch.full((64,), 7.0) for _ in range(300)]  # memory that is found again
        del junk
        loaded = load_encoder(path)[0]
        x = images((224, 224))
        with torch.inference_mode():
            tokens = loaded.vit.forward_features(x)
            torch.testing.assert_close(tokens[:, 5:], encoder(x).patches, atol=1e-4, rtol=1e-4)
