"""Frozen encoder: one that is used in training, never trained, and not saved with it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ssl_vit.model.encoder import Encoder


class Frozen(nn.Module):
    """An encoder without gradient whose weights are in no state dict: they are in a file of their
    own, and opened from it again.

    ``load_state_dict(..., strict=True)`` of what it is part of does not miss them.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode: nothing in it is random."""
        return self

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Empty state: nothing of it is saved."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # What is looked for is what it has.
        state_dict.update({f"{prefix}{k}": v for k, v in super().state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
