"""DINOv2's encoder against the original's numbers in float64, opened as its users open it."""

import json

import pytest
import torch

from ssl_vit.model.execution import choose_attention
from ssl_vit.weights.official import open_weights
from tests.parity.golden import check_there_are, close, golden_files, read_golden

FILES = golden_files("dinov2_vit_*.safetensors")


def test_there_are_recorded_numbers():
    check_there_are(FILES, "dinov2_vit_*.safetensors")


class Case:
    """A file's numbers, and our encoder with its weights. No shape tells the heads of an unusual
    width: a config.json beside the weights does."""

    def __init__(self, path, folder) -> None:
        self.config, self.golden = read_golden(path)
        start = "weights."
        self.weights = {
            k.removeprefix(start): v for k, v in self.golden.items() if k.startswith(start)
        }
        torch.save(self.weights, folder / "pytorch_model.bin")
        heads = {"num_attention_heads": self.config["num_heads"]}
        (folder / "config.json").write_text(json.dumps(heads))
        self.opened = open_weights(folder)
        self.encoder = self.opened.encoder.double()
        choose_attention(self.encoder, torch.device("cpu"))

    def images(self, i: int) -> torch.Tensor:
        return self.golden[f"images{i}"].double()

    def check(self, name: str, i: int, **masked) -> None:
        """Tokens of image ``i`` before and after the final norm, against those called ``name``."""
        encoder, registers = self.encoder, self.config["num_register_tokens"]
        x = encoder.with_prefix(encoder.embed(self.images(i), **masked))
        for block in encoder.vit.blocks:
            x = block(x)
        close(x, self.golden[f"{name}{i}.x_prenorm"], f"{name}{i}.x_prenorm")
        normed = encoder.vit.norm(x)
        parts = {"x_norm_clstoken": normed[:, 0], "x_norm_patchtokens": normed[:, 1 + registers :]}
        if registers:
            parts["x_norm_regtokens"] = normed[:, 1 : 1 + registers]
        for part, value in parts.items():
            close(value, self.golden[f"{name}{i}.{part}"], f"{name}{i}.{part}")


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("dinov2"))


def sizes(case) -> range:
    return range(len(case.config["sizes"]))


def test_positions(case):
    """The table of every size: of the training grid, and of others, larger, smaller, not square."""
    encoder, registers = case.encoder, case.config["num_register_tokens"]
    for i in sizes(case):
        prefix, patches = encoder.positions(encoder.grid_of(case.images(i)))
        expected = case.golden[f"pos{i}"]
        close(patches, expected[:, 1:], f"pos{i}")
        if not registers:  # with them timm's networks keep the position of [CLS] in the token
            close(prefix, expected[:, :1], f"pos{i}, [CLS]")


@torch.no_grad()
def test_features(case):
    assert case.opened.format == "DINOv2 (official)"
    for i in sizes(case):
        case.check("out", i)
        features = case.encoder(case.images(i))
        close(features.cls, case.golden[f"out{i}.x_norm_clstoken"], f"out{i}, cls")
        close(features.patches, case.golden[f"out{i}.x_norm_patchtokens"], f"out{i}, patches")


@torch.no_grad()
def test_masked_features(case):
    """Masked patches are the mask token, before positions are added."""
    token = case.weights["mask_token"][0].double()
    for i in sizes(case):
        case.check("masked", i, masked=case.golden[f"masks{i}"].bool(), token=token)


@torch.no_grad()
def test_intermediate_features(case):
    """The last two blocks, normed, the earlier first."""
    for i in sizes(case):
        for j, features in enumerate(case.encoder.intermediate(case.images(i), last=2)):
            close(features.cls, case.golden[f"layers{i}.{j}.cls"], f"layers{i}.{j}.cls")
            close(features.patches, case.golden[f"layers{i}.{j}.patch"], f"layers{i}.{j}.patch")
