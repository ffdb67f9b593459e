"""ONNX export: a graph from images to [CLS] and patch features, for any batch size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import EncoderInfo

_OPSET = 18  # read by every onnxruntime since 1.14


def outputs(encoder: Encoder, images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
    """Outputs of an encoder by name: ``cls`` (b, d) where it has one, ``patches`` (b, n, d).

    Where the final norm follows the pooling, also ``pooled`` (b, d): the normed mean patch.
    """
    found = encoder(images)
    named = {} if found.cls is None else {"cls": found.cls}
    named["patches"] = found.patches
    if found.norm is not None:
        named["pooled"] = found.pool("mean")
    return named


class Outputs(nn.Module):
    """Outputs module: an encoder that returns the tensors of :func:`outputs`, for the exporter."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        return tuple(outputs(self.encoder, images).values())


def write_onnx(path: Path, encoder: Encoder, info: EncoderInfo) -> None:
    """Write the ONNX graph from ``images`` (b, c, h, w) to :func:`outputs`, for any b.

    Images are normalised, of the encoder's size. The file's metadata describe the preparation:
    ``mean`` and ``std`` (per channel, of images in 0..1) and ``image_size`` (height, width) as
    JSON; and under ``ssl_vit`` the metadata of our encoder files.

    Above 2 GB, ONNX's limit for one file, the weights are in a second file next to it, with its
    name and ``.data``.
    """
    example = torch.zeros(2, encoder.channels, *encoder.image_size)
    with torch.no_grad():
        names = list(outputs(encoder, example))
    program = torch.onnx.export(
        Outputs(encoder).eval(),
        (example,),
        dynamo=True,
        opset_version=_OPSET,
        input_names=["images"],
        output_names=names,
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(
        {
            "mean": json.dumps(info.mean),
            "std": json.dumps(info.std),
            "image_size": json.dumps(encoder.image_size),
            "ssl_vit": json.dumps(dataclasses.asdict(info)),
        }
    )
    program.save(str(path))


def onnx_features(path: Path, images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
    """Features by name that onnxruntime computes from a file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {"images": images.numpy()})
    return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}


def is_onnx_export(path: Path) -> bool:
    """True if a file is an ONNX export of ssl_vit."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError):
        return False
    return any(p.key == "ssl_vit" for p in model.metadata_props)
