"""Options of DINOv2."""

from __future__ import annotations

from dataclasses import dataclass

from ssl_vit.common.checks import (
    check_least,
    check_length,
    check_not_negative,
    check_portion,
    check_positive,
    check_range,
    flag,
)
from ssl_vit.common.errors import check
from ssl_vit.common.scalars import Scalar
from ssl_vit.options.base import Defaults, Kind
from ssl_vit.options.dino import EXPLAINED as OF_DINO
from ssl_vit.options.dino import DINOConfig


def _patchwise(scalars: dict[str, Scalar]) -> dict[str, Scalar]:
    """The same of masked patches."""
    return {
        f"patch_{k}": s._replace(title=f"Patches: {s.title[0].lower()}{s.title[1:]}")
        for k, s in scalars.items()
    }


_OF_TARGETS = {
    name: OF_DINO[name]
    for name in ("teacher_entropy", "teacher_entropy_share", "kl", "prototypes_used", "center_norm")
} | {
    "unevenness": Scalar(
        "Unevenness after Sinkhorn-Knopp",
        "Share of the targets that would have to move for all prototypes to get as much: what "
        "three iterations have left. It should be small.",
    )
}
TITLE = "DINOv2"
EXPLAINED: dict[str, Scalar] = {
    "loss": Scalar(
        "Loss",
        "Weighted sum of the losses below. It may rise while the features get better, as its "
        "target moves: look at k-NN.",
    ),
    "cls_loss": Scalar("Loss of [CLS]", "Cross-entropy of teacher and student for [CLS]."),
    "patch_loss": Scalar(
        "Loss of masked patches",
        "Cross-entropy of teacher and student for masked patches, averaged over all global "
        "crops: those without masks, half of them, count as 0.",
    ),
    "koleo": Scalar("KoLeo", "Sum over both global crops. It falls as images move apart."),
    "neighbour_distance": Scalar(
        "Distance to the nearest neighbour",
        "Of [CLS] on the unit sphere, in the batch. Near 0 the images are all the same to it.",
    ),
    "gram_loss": Scalar(
        "Gram loss",
        "Mean squared difference of patch similarities from the older teacher's. It is 0 until "
        "the anchoring begins, then it falls and stays low.",
    ),
    **_OF_TARGETS,
    **_patchwise(_OF_TARGETS),
}
DEFAULTS: Defaults = {
    "encoder": {"drop_path": 0.3, "layer_scale": 1e-5},
    "optim": {
        "base_lr": 4e-3,
        "lr_rule": "sqrt",
        "min_lr": 1e-6,
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "clip": 3.0,
        "clip_by": "network",
        "layer_decay": 0.9,
        "patch_lr": 0.2,
    },
}


@dataclass(frozen=True)
class DINOv2Config(DINOConfig):
    """Self-distillation of [CLS], as DINO's, and of masked patches, as iBOT's, with features spread
    by KoLeo. Defaults are DINOv2's."""

    norm_last_layer: bool = False
    momentum: float = 0.992
    teacher_temp: float = 0.07
    teacher_temp_warmup: str = "30ep"
    """Length of that warm-up, which rises step by step."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    targets: Kind = "centering"
    """Targets from the teacher's outputs: softmax less a running centre, or Sinkhorn-Knopp over the
    batch (DINOv3, and DINOv2's large models)."""
    patch_weight: float = 1.0
    """Weight of the loss of masked patches."""
    patch_prototypes: int = 0
    """Outputs of the patches' own head (DINOv2's large models, DINOv3). 0: they share [CLS]'s."""
    patch_bottleneck: int = 0
    """Features before the last layer of that head. 0: as of [CLS]'s."""
    plain_last_layer: bool = False
    """The heads' last layers are plain linear ones (DINOv3), not weight-normalised."""
    mask_probability: float = 0.5
    """Share of the global crops of which patches are masked."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Share of the patches of such a crop that is masked, least and most; a batch has all shares
    between."""
    exact_masks: bool = False
    """A crop masks the most of its stratum of that range, filled up at random (DINOv3); else a
    share drawn from it, and blocks may fall a few patches short."""
    koleo_weight: float = 0.1
    """Weight of KoLeo, which moves [CLS] of each image away from its nearest neighbour's."""
    koleo_images: int = 0
    """Neighbours are sought among so many images in a row (the originals: the 64 of a process). 0:
    all of a step, over all processes, but not over --optim.accumulate parts."""
    local_weight: float = 1.0
    """Weight of pairs with a local crop in the loss of [CLS] (DINOv3's later recipes: 0.5)."""
    local_norm: bool = False
    """[CLS] of local crops has a final norm of its own in training (DINOv3's 7B)."""
    gram_weight: float = 0.0
    """Weight of Gram anchoring (DINOv3: 2, late in a long training): similarities between patches
    stay those of an older teacher, which sees larger crops. 0: none."""
    gram_encoder: str = ""
    """Teacher of the Gram anchoring: a run folder or weight file, as for --init.encoder. Empty: the
    training's own teacher when the anchoring begins."""
    gram_from: str = "0ep"
    """Part of the training before it begins, as 80ep or 500000st."""
    gram_every: str = ""
    """Take the training's own teacher anew this often from then on, as 10000st. Empty: never."""
    gram_scale: int = 2
    """Size of that teacher's crops over that of the global ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "patch_weight")
        check_least(self, 0, "patch_prototypes", "patch_bottleneck", "koleo_images")
        check_portion(self, "mask_probability")
        check_range(self, "mask_ratio")
        check_not_negative(self, "koleo_weight", "local_weight", "gram_weight")
        check_least(self, 1, "gram_scale")
        check_length(self, "gram_from")
        if self.gram_every:
            check_length(self, "gram_every", positive=True)
        check(
            not self.gram_encoder or self.gram_weight > 0,
            f"{flag(self, 'gram_encoder')} is {self.gram_encoder!r}; it has no effect without "
            f"{flag(self, 'gram_weight')}",
        )
        own = "patch_bottleneck" if self.patch_bottleneck else ""
        check(
            not own or self.patch_prototypes > 0,
            f"{flag(self, 'patch_bottleneck')} is {self.patch_bottleneck}; it is of the patches' "
            f"own head, which {flag(self, 'patch_prototypes')} makes",
        )
