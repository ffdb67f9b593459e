"""I-JEPA against numbers recorded from the original, in float64, relative 1e-6: one whole step."""

import pytest
import torch
from torch import Tensor

from ssl_vit.common.config import EncoderConfig, OptimConfig
from ssl_vit.methods.ijepa import IJEPA, smooth_l1
from ssl_vit.model.encoder import take
from ssl_vit.model.execution import choose_attention
from ssl_vit.options.ijepa import IJEPAConfig
from ssl_vit.training.optim import make_optimizer
from tests.parity.golden import check_there_are, close, golden_files, read_golden

FILES = golden_files("ijepa_*.safetensors")
_NETWORKS = {"encoder": "encoder.vit", "target": "objectives.ijepa.teacher.encoder.vit"}
_PREDICTOR = {
    "predictor_embed": "embed",
    "predictor_blocks": "blocks",
    "predictor_norm": "norm",
    "predictor_proj": "predict",
    "predictor_pos_embed": "positions",
    "mask_token": "mask_token",
}


def test_there_are_golden_files():
    check_there_are(FILES, "ijepa_*.safetensors")


def our_name(theirs: str) -> str:
    """The original's parameter name as ours."""
    network, _, name = theirs.partition(".")
    if network in _NETWORKS:
        return f"{_NETWORKS[network]}.{name}"
    head, _, rest = name.partition(".")
    return f"objectives.ijepa.predictor.{_PREDICTOR[head]}.{rest}".rstrip(".")


def pair(size) -> tuple[int, ...]:
    return tuple(size) if isinstance(size, list) else (size,)


class Case:
    """A golden file, and our method with its weights."""

    def __init__(self, path) -> None:
        self.config, self.golden = read_golden(path)
        c = self.config
        encoder = EncoderConfig(
            arch="vit_base_patch16_gap_224",  # which has no [CLS]
            image_size=pair(c["img_size"]),
            patch_size=c["patch_size"],
            width=c["embed_dim"],
            depth=c["depth"],
            heads=c["num_heads"],
            positions="sincos",
        )
        method = IJEPAConfig(
            targets=c["num_pred_masks"],
            predictor_width=c["predictor_embed_dim"],
            predictor_depth=c["predictor_depth"],
            predictor_heads=c.get("predictor_num_heads", 0),
            momentum=c["momentum"],
        )
        self.images = self.golden["images"].double()
        self.model = IJEPA(method, encoder, self.images.shape[1]).double().train()
        self.objective, self.own = self.model.objective, self.model.encoder
        choose_attention(self.model, torch.device("cpu"))
        self.own_positions = {
            "encoder.pos_embed": self.own.vit.pos_embed.detach().clone(),
            "target.pos_embed": self.objective.teacher.encoder.vit.pos_embed.detach().clone(),
            "predictor.predictor_pos_embed": self.objective.predictor.positions.clone()[None],
        }
        weights = self.named("weights")
        positions = weights.pop("objectives.ijepa.predictor.positions")
        self.objective.predictor.positions.copy_(positions[0])
        self.model.load_state_dict(weights, strict=True)
        masks = range(c["num_enc_masks"]), range(c["num_pred_masks"])
        self.contexts = [self.golden[f"context_mask{i}"] for i in masks[0]]
        self.targets = torch.stack([self.golden[f"target_mask{i}"] for i in masks[1]], 1)

    def named(self, start: str) -> dict[str, Tensor]:
        """Recorded tensors of our parameters."""
        return {
            our_name(name.removeprefix(f"{start}.")): value.double()
            for name, value in self.golden.items()
            if name.startswith(f"{start}.")
        }

    def wanted(self) -> Tensor:
        """Targets, (B, T, M, D)."""
        seen = take(self.objective.targets(self.images), self.targets.flatten(1))
        return seen.unflatten(1, self.targets.shape[1:])

    def predictions(self) -> list[Tensor]:
        """From each context block, (B, T, M, D)."""
        return [
            self.objective.predict(self.own, self.images, c, self.targets) for c in self.contexts
        ]

    def loss(self) -> Tensor:
        wanted = self.wanted()
        weights = torch.ones_like(wanted[..., 0])
        return torch.stack([smooth_l1(p, wanted, weights) for p in self.predictions()]).mean()

    def step(self) -> None:
        """One step of AdamW, and the teacher after it."""
        config = OptimConfig(lr=self.config["lr"], weight_decay=self.config["weight_decay"])
        optimizer = make_optimizer(self.model, config)
        self.loss().backward()
        optimizer.step()
        self.objective.set_length(100, 10)
        self.objective.after_update(self.own, 0, torch.tensor(True))


def in_order(of_contexts: list[Tensor]) -> Tensor:
    """As recorded: block by block, for each the contexts, for each the images."""
    return torch.stack(of_contexts).permute(2, 0, 1, 3, 4).flatten(0, 2)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def case(request) -> Case:
    return Case(request.param)


def test_positions(case):
    """Our sine-cosine tables are the original's; ours are computed in float64, kept in float32."""
    for name, own in case.own_positions.items():
        expected = case.golden[f"weights.{name}"].float()
        torch.testing.assert_close(own.float(), expected, rtol=0, atol=1e-7)


def test_targets(case):
    """The outputs for whole images, and the teacher's of the target blocks, layer-normalised."""
    golden = case.golden
    close(case.own(case.images).patches, golden["encoder_unmasked"], "encoder, whole images")
    teacher = case.objective.teacher.encoder
    close(teacher(case.images).patches, golden["target_full"], "teacher, whole images")
    close(in_order([case.wanted()] * len(case.contexts)), golden["targets"], "targets")


def test_predictions_and_loss(case):
    """What the encoder makes of the context, predictions, and loss."""
    seen = [case.own.encode(case.own.embed(case.images, keep=c)) for c in case.contexts]
    close(torch.cat(seen), case.golden["context"], "context")
    close(in_order(case.predictions()), case.golden["predictions"], "predictions")
    close(case.loss()[None], case.golden["loss"], "loss")


def test_gradients(case):
    """Every gradient of the original's, and no other."""
    case.loss().backward()
    found = {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}
    expected = case.named("grads")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value, name)


def test_a_step(case):
    """AdamW, which decays the mask token as it does matrices; then the teacher moves."""
    case.step()
    found, expected = case.model.state_dict(), case.named("after")
    assert {n for n in found if "pos_embed" not in n} == expected.keys()
    for name, value in expected.items():
        close(found[name], value, name)
