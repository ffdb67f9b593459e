"""LeJEPA's SIGReg and loss against numbers of the original, in float64, relative 1e-6."""

import pytest
import torch
from torch.nn import functional as F

from ssl_vit.objectives.sigreg import invariance, sigreg
from tests.parity.golden import check_there_are, close, golden_files, read_golden

FILES = golden_files("lejepa_sigreg*.safetensors")


def test_there_are_golden_files():
    check_there_are(FILES, "lejepa_sigreg*.safetensors")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loss(path):
    """Each statistic, both terms with their gradients, and the loss."""
    config, golden = read_golden(path)
    directions = F.normalize(golden["directions_raw"].double(), dim=0)
    projections = golden["projections"].double().requires_grad_()
    views, slices = golden["statistics"].shape
    for view in range(views):
        for i in range(0, slices, 37):
            found = sigreg(projections[view : view + 1].detach(), directions[:, i : i + 1])
            close(found[None], golden["statistics"][view, i : i + 1], f"view {view}, slice {i}")
    apart, agree = sigreg(projections, directions), invariance(projections, views)
    close(apart[None], golden["sigreg"], "SIGReg")
    close(agree[None], golden["invariance"], "invariance")
    lamb = config["lamb"]
    close(((1 - lamb) * agree + lamb * apart)[None], golden["loss"], "loss")
    for value, name in ((apart, "sigreg"), (agree, "invariance")):
        (gradient,) = torch.autograd.grad(value, projections)
        close(gradient, golden[f"grads.{name}.projections"], f"gradient of {name}")
