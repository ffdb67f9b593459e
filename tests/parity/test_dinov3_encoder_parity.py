"""DINOv3's encoder against the original's numbers in float64, opened as its users open it."""

import json

import pytest
import torch

from ssl_vit.model.execution import choose_attention
from ssl_vit.weights.official import open_weights
from tests.parity.golden import GOLDEN, check_there_are, close, golden_files, read_golden

FILES = golden_files("dinov3_vit_*.safetensors")


def test_there_are_recorded_numbers():
    check_there_are(FILES, "dinov3_vit_*.safetensors")


class Case:
    """A file's numbers, and our encoder with its weights, which are in an official file."""

    def __init__(self, path, folder) -> None:
        self.config, self.golden = read_golden(path)
        self.name, start = path.stem, "weights."
        self.weights = {
            k.removeprefix(start): v for k, v in self.golden.items() if k.startswith(start)
        }
        torch.save(self.weights, folder / "dinov3.pth")
        self.opened = open_weights(folder / "dinov3.pth")
        self.encoder = self.opened.encoder.double()
        choose_attention(self.encoder, torch.device("cpu"))

    def images(self, i: int) -> torch.Tensor:
        return self.golden[f"images{i}"].double()

    def check(self, name: str, i: int, **masked) -> None:
        """Tokens of image ``i`` before and after the final norm, against those called ``name``."""
        encoder, first = self.encoder, 1 + self.config["n_storage_tokens"]
        tokens = encoder.embed(self.images(i), **masked)
        x = encoder.with_prefix(tokens)
        for block, turn in encoder.blocks(tokens):
            x = block(x, **turn)
        close(x, self.golden[f"{name}{i}.x_prenorm"], f"{name}{i}.x_prenorm")
        normed = encoder.vit.norm(x)
        parts = {
            "x_norm_clstoken": normed[:, 0],
            "x_storage_tokens": normed[:, 1:first],
            "x_norm_patchtokens": normed[:, first:],
        }
        for part, value in parts.items():
            close(value, self.golden[f"{name}{i}.{part}"], f"{name}{i}.{part}")


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("dinov3"))


def sizes(case) -> range:
    return range(len(case.config["sizes"]))


def test_report(case):
    """What is left out is said; the rest is all there."""
    assert case.opened.format == "DINOv3 (official)"
    n, left = len(case.encoder.vit.state_dict()), {"mask_token": 1, "rope_embed": 1}
    masked = sum(name.endswith("bias_mask") for name in case.weights)
    left |= {"bias_mask": masked} if masked else {}
    left |= {"local_cls_norm": 2} if case.config["untie_global_and_local_cls_norm"] else {}
    listed = ", ".join(f"{name} {count}" for name, count in sorted(left.items()))
    assert case.opened.report == f"{n} of {n} tensors; left out: {listed}"


def test_names(case):
    """Every tensor has the name in timm's network that was recorded."""
    names = json.loads((GOLDEN / "dinov3_names.json").read_text()).get(case.name)
    if names is None:
        pytest.skip("no names are recorded for this case")
    theirs = {timm for _, _, timm in names if timm != "-"}
    assert case.encoder.vit.state_dict().keys() == theirs


@torch.no_grad()
def test_features(case):
    for i in sizes(case):
        case.check("out", i)
        features = case.encoder(case.images(i))
        close(features.cls, case.golden[f"out{i}.x_norm_clstoken"], f"out{i}, cls")
        close(features.patches, case.golden[f"out{i}.x_norm_patchtokens"], f"out{i}, patches")


@torch.no_grad()
def test_masked_features(case):
    """Masked patches are the mask token; they turn by their places all the same."""
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
