"""A whole step of DINOv2, and of DINOv3, against the originals' numbers in float64, relative 1e-6:
terms, total, every gradient, and the teacher afterwards."""

import json
from typing import Any

import pytest
import torch
from timm.layers import SwiGLUPacked

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.rates import PretrainOptim
from ssl_vit.common.task import Views
from ssl_vit.methods.dinov2 import DINOv2
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.execution import choose_attention
from ssl_vit.options.dinov2 import DINOv2Config
from ssl_vit.training.optim import make_optimizer
from ssl_vit.weights.keymaps import with_own_position
from tests.parity.golden import check_there_are, close, golden_files, read_golden

FILES = [*golden_files("dinov2_step_*.safetensors"), *golden_files("dinov3_step_*.safetensors")]
GROUPS = golden_files("dinov[23]_param_groups.json")
ROTARY = "vit_small_patch16_dinov3_qkvb"
State = dict[str, torch.Tensor]


@pytest.mark.parametrize("version", [2, 3])
def test_there_are_golden_files(version):
    check_there_are(golden_files(f"dinov{version}_step_*.safetensors"), f"dinov{version}_step_*")
    check_there_are(golden_files(f"dinov{version}_param_groups.json"), "dinov*_param_groups.json")


def backbone(state: State, rotary: bool) -> State:
    """Official names of an encoder's tensors, or of their gradients, as timm's."""
    found: State = {}
    for name, value in state.items():
        if name == "mask_token" or "bias_mask" in name or "rope_embed" in name:
            continue
        name = name.replace("storage_tokens", "reg_token").replace("register_tokens", "reg_token")
        name = name.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2.")
        if rotary:
            name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if rotary and name.endswith("qkv.bias"):
            q, _, v = value.chunk(3)  # that of keys is masked
            found |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            found[name] = value
    return found


def ours(state: State, rotary: bool, owner: str = "") -> State:
    """Official names of a student (or of its gradients) as ours; ``owner``: of a teacher."""
    start = "objectives.dinov2."
    heads, encoder = (
        f"{start}{owner}head.",
        f"{start}{owner}encoder.vit." if owner else "encoder.vit.",
    )
    parts: dict[str, State] = {"backbone": {}, "dino_head": {}, "ibot_head": {}}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value.double()
    local = {k: parts["backbone"].pop(k) for k in list(parts["backbone"]) if "local_cls_norm" in k}
    found = {encoder + k: v for k, v in backbone(parts["backbone"], rotary).items()}
    found |= {f"{heads}cls.{k}": v for k, v in parts["dino_head"].items()}
    found |= {f"{heads}patch.{k}": v for k, v in parts["ibot_head"].items()}
    found |= {k.replace("local_cls_norm", f"{heads}local_norm"): v for k, v in local.items()}
    if not owner and "mask_token" in parts["backbone"]:
        found[f"{start}mask_token"] = parts["backbone"]["mask_token"]
    return found


class Case:
    """A recorded step, and our method with its weights."""

    def __init__(self, path) -> None:
        self.config, self.golden = c, _ = read_golden(path)
        self.rotary = "n_storage_tokens" in c
        self.method = DINOv2(self.options(), self.encoder_options(), 3)
        if c["ffn_layer"] == "swiglufused":
            self._set_hidden()
        self.method.double().train()
        choose_attention(self.method, torch.device("cpu"))
        self._load()
        self.method.set_length(10, 5)
        self.method.objective.teacher_momentum = lambda step: c["momentum"]
        if "gram_crops" in self.golden:  # recorded apart, not one from the other
            crops = [self.golden[f"{name}_crops"].double() for name in ("global", "gram")]
            self.method.objective._global_crops = lambda views: tuple(crops)

    def options(self) -> DINOv2Config:
        c = self.config
        centering = c.get("centering", "sinkhorn_knopp")
        return DINOv2Config(
            prototypes=c["dino_prototypes"],
            head_depth=c["head_nlayers"],
            head_width=c["head_hidden_dim"],
            bottleneck=c["dino_bottleneck_dim"],
            patch_prototypes=c["ibot_prototypes"] if c.get("separate_head", True) else 0,
            patch_bottleneck=c["ibot_bottleneck_dim"] if c.get("separate_head", True) else 0,
            plain_last_layer=self.rotary,
            targets="sinkhorn" if centering == "sinkhorn_knopp" else "centering",
            teacher_temp=c["teacher_temp"],
            teacher_temp_warmup="0ep",
            student_temp=c["student_temp"],
            center_momentum=c.get("center_momentum", 0.9),
            local_crops=c["n_local"],
            local_size=(c["local_size"],),
            mask_probability=c["mask_probability"],
            mask_ratio=tuple(c["mask_ratio"]),
            exact_masks=self.rotary,
            koleo_weight=c["koleo_loss_weight"],
            patch_weight=c["ibot_loss_weight"],
            local_weight=c.get("local_loss_weight", 1.0),
            local_norm=c.get("untie_global_and_local_cls_norm", False),
            gram_weight=c.get("gram_loss_weight", 0.0),
        )

    def encoder_options(self) -> EncoderConfig:
        c = self.config
        plain = "vit_small_patch14_reg4_dinov2"
        gated = "vit_giant_patch14_reg4_dinov2"
        arch = ROTARY if self.rotary else gated if "swiglu" in c["ffn_layer"] else plain
        return EncoderConfig(
            arch=arch,
            image_size=(c["global_size"],),
            patch_size=c["patch_size"],
            width=c["embed_dim"],
            depth=c["depth"],
            heads=c["num_heads"],
            registers=c["n_storage_tokens"] if self.rotary else c["num_register_tokens"],
            layer_scale=c["layerscale"],
            norm_eps=1e-5 if c.get("norm_layer") == "layernormbf16" else 1e-6,
            resampling="timm",
        )

    def _set_hidden(self) -> None:
        """A gated MLP's hidden features are aligned to 8 by the original, not by timm."""
        width = self.config["embed_dim"]
        for part in self.method.modules():
            if isinstance(part, Encoder):
                hidden = self.golden["student.backbone.blocks.0.mlp.w12.weight"].shape[0]
                for block in part.vit.blocks:
                    block.mlp = SwiGLUPacked(width, hidden)

    def part(self, start: str) -> State:
        return {k.removeprefix(start): v for k, v in self.golden.items() if k.startswith(start)}

    def _load(self) -> None:
        """Every recorded weight, and nothing else."""
        state = self.placed(ours(self.part("student."), self.rotary))
        state |= self.placed(ours(self.part("teacher."), self.rotary, "teacher."))
        older = ours(self.part("gram_teacher."), self.rotary, "gram.")
        state |= {k: v for k, v in older.items() if ".gram.encoder." in k}
        if "center" in self.golden and self.method.objective.cls_targets.center is not None:
            for name, key in (("cls", "center"), ("patch", "patch_center")):
                value = self.golden[key].double().flatten()
                state[f"objectives.dinov2.{name}_targets.center.value"] = value
        self.method.load_state_dict(state, strict=True)

    def placed(self, state: State) -> State:
        """The position of [CLS] is in the token, as timm has it where there are registers."""
        if self.rotary:
            return state
        for start in {k.removesuffix("pos_embed") for k in state if k.endswith("pos_embed")}:
            own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            state |= {start + k: v for k, v in with_own_position(own).items()}
        return state

    def views(self) -> Views:
        c, golden = self.config, self.golden
        batch, masks = c["batch"], golden["masks"].bool()
        found = masks.flatten().nonzero().flatten()
        patches = torch.zeros(c["upperbound"], dtype=torch.int64)
        weights = torch.zeros(c["upperbound"], dtype=torch.float64)
        patches[: len(found)] = found
        each = (1 / masks.sum(1).clamp(min=1)).double()
        weights[: len(found)] = each[:, None].expand_as(masks)[masks]
        crops = [*golden["global_crops"].double().chunk(2), golden["local_crops"].double()]
        drawn = {"masked": masks, "patches": patches, "weights": weights}
        return Views(crops, torch.arange(batch), torch.full((batch,), -1), drawn=drawn)


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def case(request) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def scalars(case) -> State:
    found = case.method(case.views(), 0)
    found["loss"].backward()
    return found


def test_terms_and_total(case, scalars):
    """v2 logs half of KoLeo and of the patch loss, v3 the mean over crops, unscaled."""
    c, terms, found = case.config, case.part("terms."), {k: v[None] for k, v in scalars.items()}
    close(found["loss"].detach(), case.golden["loss"], "loss")
    twice = 1 if case.rotary else 2
    close(found["patch_loss"], twice * terms["ibot_loss"], "patches")
    each, local = terms["dino_global_crops_loss"], terms["dino_local_crops_loss"]
    if case.rotary:
        n = c["n_local"]
        each, local = each / (1 + n), local * n / (1 + n) * c["local_loss_weight"]
        close(found["koleo"], 2 * terms["koleo_loss"], "koleo")
        close(found["gram_loss"], terms["gram_loss"], "Gram")
    else:
        close(c["koleo_loss_weight"] * found["koleo"], twice * terms["koleo_loss"], "koleo")
    close(found["cls_loss"], each + local, "[CLS]")


def test_every_gradient(case, scalars):
    found = {n: p.grad for n, p in case.method.named_parameters() if p.grad is not None}
    expected = ours(case.part("grads."), case.rotary)
    positions = expected.get("encoder.vit.pos_embed")
    if positions is not None:
        close(expected["encoder.vit.cls_token"], positions[:, :1], "both of [CLS]")
        expected["encoder.vit.pos_embed"] = positions[:, 1:]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value, name)


def test_the_teacher_afterwards(case, scalars):
    case.method.after_update(0, torch.tensor(True))
    state = case.method.state_dict()
    expected = case.placed(ours(case.part("teacher_after."), case.rotary, "teacher."))
    assert {k for k in state if ".teacher." in k} == expected.keys()
    for name, value in expected.items():
        close(state[name], value, name)


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: path.stem)
def test_rates_and_decays(path):
    """The multiplier of every parameter; the last layers are those that are frozen at first."""
    golden = json.loads(path.read_text())
    rotary, options = path.stem.startswith("dinov3"), golden["options"]
    config = DINOv2Config(
        prototypes=8,
        head_width=8,
        bottleneck=4,
        plain_last_layer=rotary,
        local_norm=rotary,
        local_crops=0,
    )
    optim = PretrainOptim(
        weight_decay=1.0,
        layer_decay=options["lr_decay_rate"],
        patch_lr=options["patch_embed_lr_mult"],
    )
    arch = "vit_huge_plus_patch16_dinov3_qkvb" if rotary else "vit_giant_patch14_reg4_dinov2"
    sizes: dict[str, Any] = {"image_size": (28,), "patch_size": 14, "width": 32, "heads": 2}
    method = DINOv2(config, EncoderConfig(arch=arch, depth=golden["depth"], **sizes), 3)
    parameters = dict(method.named_parameters())
    made = make_optimizer(method, optim).param_groups
    groups = {p: group for group in made for p in group["params"]}
    moved = set()
    for part in ("backbone", "dino_head"):
        for name, expected in golden[part].items():
            for own in names(f"{part}.{name}", rotary):
                moved.add(own)
                group = groups[parameters[own]]
                assert group["lr_scale"] == pytest.approx(expected["lr"]), own
                assert group["weight_decay"] == expected["wd"], own
                assert ("last_layer." in own) == expected["last_layer"], own
    assert moved == {n for n, p in parameters.items() if p.requires_grad}


def names(theirs: str, rotary: bool) -> list[str]:
    """Our parameters of an official one."""
    if rotary:
        theirs = theirs.replace("mlp.w1.", "mlp.fc1_g.").replace("mlp.w2.", "mlp.fc1_x.")
        theirs = theirs.replace("mlp.w3.", "mlp.fc2.")
    return list(ours({theirs: torch.zeros(3)}, rotary))
