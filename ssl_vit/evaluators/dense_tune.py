"""Dense fine-tuning: an encoder and a head on its feature maps, trained together, as a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ssl_vit.common.errors import UserError
from ssl_vit.common.task import Views
from ssl_vit.data.dense import TARGET
from ssl_vit.evaluators.maps import FeatureMaps
from ssl_vit.evaluators.maps_task import MapsTask
from ssl_vit.model.encoder import Encoder

Loss = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
"""From what the head makes of a batch and its targets to scalars, among them ``loss``."""


class DenseNetwork(nn.Module):
    """Network for places in an image: feature maps, and a head on them.

    ``heads_maps``: from the list of maps to what the head takes.
    """

    def __init__(
        self, maps: FeatureMaps, head: nn.Module, heads_maps: Callable[[list[Tensor]], Any]
    ) -> None:
        super().__init__()
        self.maps, self.head, self.heads_maps = maps, head, heads_maps

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.head(self.heads_maps(self.maps(images)))
        return made


class DenseTune(MapsTask):
    """Dense fine-tuning task: the loss of a network's predictions for augmented crops."""

    def __init__(self, network: DenseNetwork, loss: Loss, layer_decay: float) -> None:
        super().__init__()
        self.network, self.loss = network, loss
        self.train_encoder(network.maps, "network.maps", layer_decay)

    @property
    def evaluated(self) -> DenseNetwork:
        """Network that is evaluated and saved."""
        return self.network

    def forward(self, views: Views, step: int) -> dict[str, Tensor]:
        """Scalars of ``Loss``."""
        return dict(self.loss(self.network(views.crops[0]), views.drawn[TARGET]))


def trainable(module: nn.Module, drop_path: float) -> nn.Module:
    """Encoder with stochastic depth, with the same weights; another network as it is."""
    if not isinstance(module, Encoder) or not drop_path:
        return module
    with torch.random.fork_rng(devices=[]):
        made = Encoder(replace(module.config, drop_path=drop_path), module.channels)
    made.load_state_dict(module.state_dict())
    return made


def train_what_counts(network: DenseNetwork, size: tuple[int, int], channels: int) -> None:
    """Train the weights that predictions depend on, and no others: those of what follows the last
    map (a norm before the classifier that is gone) have no gradient, which processes that train
    together would wait for.

    Raises:
        UserError: the network takes no images of this size.
    """
    images = torch.zeros(1, channels, *size)
    trained = [p for p in network.parameters() if p.requires_grad]
    was = network.training
    try:
        made = network.eval()(images).sum()
    except Exception as error:  # timm's networks raise what they like
        text = " ".join(str(error).split())[:200]
        sides = f"{size[0]}x{size[1]}"
        raise UserError(
            f"images of {sides} do not fit: {text}; give another --tune.image-size"
        ) from None
    for weight, slope in zip(
        trained, torch.autograd.grad(made, trained, allow_unused=True), strict=True
    ):
        weight.requires_grad_(slope is not None)
    network.train(was)
