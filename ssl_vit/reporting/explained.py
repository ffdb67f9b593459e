"""Glossary: what each logged number means, and how it should move."""

from __future__ import annotations

from collections.abc import Iterable

from ssl_vit.common.scalars import Scalar
from ssl_vit.methods import find_options, method_names

# Before what methods log of themselves, and after; order is that of the page.
_FIRST = {
    "loss": Scalar("Loss", "What is minimised."),
    "knn": Scalar(
        "k-NN accuracy, %",
        "Held-out images classified by their nearest training images, on frozen features: the "
        "number to watch. It should rise, and pass raw pixels. (Mean average precision, where an "
        "image may have several labels.)",
    ),
    "selection_knn": Scalar(
        "k-NN accuracy to choose by, %",
        "By this encoder-best.safetensors is chosen: of images that are held out for it alone or, "
        "where too few can be, of training images by each other; never of those that are scored.",
    ),
    "feature_std": Scalar(
        "Feature spread",
        "1: features spread evenly over the sphere; 0: every image has the same. A fall towards 0 "
        "is a collapse.",
    ),
    "rankme": Scalar(
        "Effective rank",
        "How many directions the features use (RankMe). Higher is mostly better; near 1 all images "
        "lie on a line.",
    ),
}
_LAST = {
    "val_top1": Scalar(
        "Accuracy on held-out images, %", "Of the network as it is being fine-tuned."
    ),
    "val_top5": Scalar(
        "Top-5 accuracy on held-out images, %", "Its class among the five best guesses."
    ),
    "val_map": Scalar(
        "Mean average precision on held-out images, %",
        "Of several labels an image, by the network as it is being fine-tuned.",
    ),
    "class": Scalar(
        "Loss of classes", "Of proposals or queries: which class, or none.", falls=True
    ),
    "box": Scalar("Loss of boxes", "Of proposals or queries with an object: where its edges are."),
    "giou": Scalar(
        "Loss of boxes' overlap",
        "One minus the generalized IoU of queries with an object, times two.",
        falls=True,
    ),
    "auxiliary": Scalar(
        "Losses of earlier decoder layers", "Of classes, edges and overlap, in all.", falls=True
    ),
    "objectness": Scalar(
        "Loss of objectness", "Of anchors: whether an object is there.", falls=True
    ),
    "proposal_box": Scalar("Loss of proposals' boxes", "Of anchors with an object."),
    "mask": Scalar(
        "Loss of masks", "Of proposals with an object: which pixels are its.", falls=True
    ),
    "val_ap": Scalar(
        "AP of boxes on held-out images, %",
        "Average precision over IoU 0.50 to 0.95 and classes, by pycocotools; it should rise.",
    ),
    "val_mask_ap": Scalar("AP of masks on held-out images, %", "As that of boxes."),
    "pixel_accuracy": Scalar(
        "Pixels of the right class, share", "Of the crops that are trained on; it should rise."
    ),
    "val_miou": Scalar(
        "Mean IoU on held-out images, %",
        "Overlap of true and predicted pixels of a class, mean over classes; it should rise.",
    ),
    "val_dice": Scalar("Dice on held-out images, %", "Mean over classes; it rises with mean IoU."),
    "val_pixel_accuracy": Scalar("Pixels of the right class on held-out images, %"),
    "val_class_accuracy": Scalar("The same, as the mean over classes, %"),
    "abs_rel": Scalar(
        "Error of depths, share", "Of the depth, on the crops that are trained on.", falls=True
    ),
    "val_delta1": Scalar(
        "Delta1 on held-out images, %",
        "Share of pixels whose depth is right within a factor of 1.25; it should rise.",
    ),
    "val_delta2": Scalar("Delta2 on held-out images, %", "The same, within 1.25 squared."),
    "val_delta3": Scalar("Delta3 on held-out images, %", "The same, within 1.25 cubed."),
    "val_abs_rel": Scalar("Error of depths on held-out images, % of the depth", "", falls=True),
    "val_rmse": Scalar("RMSE on held-out images, in the unit of depth", "", falls=True),
    "val_log10": Scalar("Error of the logarithm of depths on held-out images", "", falls=True),
    "grad_norm": Scalar(
        "Gradient norm",
        "Before clipping. Single peaks are normal; a steady climb asks for a lower rate.",
    ),
    "start_distance": Scalar(
        "Distance from the first features",
        "One minus the cosine between features and those of the weights that training began with.",
    ),
    "encoder_share": Scalar(
        "Encoder's share of its learning rate", "0 while it is frozen, then it rises to 1."
    ),
    "lr": Scalar("Learning rate", "Warm-up, then half a cosine."),
    "images_per_s": Scalar("Images per second", "Over all processes, without saving and probing."),
    "waiting": Scalar(
        "Share of the time waiting for images",
        "Above a fifth the loader holds the training up.",
    ),
    "energy_j": Scalar("Energy, joules a line", "Of GPUs and processors that count it themselves."),
}


_FEATURES = {"cls": "[CLS]", "mean": "mean patch"}
_EVALUATORS = {
    "knn": "k-NN",
    "linear": "linear probe",
    "attentive": "attentive probe",
    "finetune": "fine-tuning",
    "detect": "detection",
    "segment": "segmentation probe",
    "depth": "depth probe",
}
# By a picture's name, or by what stands behind its last hyphen.
_PICTURES = {
    "reconstruction": "The same images, masked alike, at every look: what is hidden, and what is "
    "made of it.",
    "attention": "Where [CLS] looks in the last block.",
    "pca": "The first three principal components of all patches as red, green and blue: parts that "
    "the encoder takes for alike get the same colour.",
    "neighbours": "Held-out images, and those whose features are nearest.",
    "detections": "Annotated objects, and what the detector finds.",
    "boundaries": "Boundaries between classes of pixels: the true ones, and the predicted ones.",
    "depths": "True and predicted depths, and how far they are apart.",
    "segment-boundaries": "Boundaries between classes of pixels by the segmentation probe on the "
    "encoder.",
    "maps": "True and predicted depths by the depth probe on the encoder.",
    "nearest": "Queries, and the images that retrieval ranks first: right ones and others.",
    "query": "Where the attentive probe's query attends in validation images.",
    "copies": "Images that are on both sides of the split, from the most to the least similar.",
    "within": "Images of which the set has another copy, from the most to the least similar.",
}


def feature(name: str) -> str:
    """A feature as people call it."""
    return _FEATURES.get(name, name)


def picture_title(name: str) -> str:
    """A picture as people call it; ``name`` is its path in the run's folder, without its ending."""
    folder, _, last = name.rpartition("/")
    title = "PCA of patch features" if last == "pca" else last.capitalize().replace("-", " ")
    return f"{title}, {folder}" if folder else title


def picture_meaning(name: str) -> str:
    """Meaning of a picture; empty for one not known here."""
    last = name.rpartition("/")[2]
    return _PICTURES.get(last, _PICTURES.get(last.rpartition("-")[2], ""))


def neighbours_of(name: str) -> str:
    """Setting of a k-NN number: ``knn20_cls`` is ``k = 20, [CLS]``."""
    k, _, pooling = name.removeprefix("knn").partition("_")
    return f"k = {k}, {feature(pooling)}"


def evaluator(name: str) -> str:
    """An evaluator as people call it."""
    return _EVALUATORS.get(name, name)


def method_title(name: str) -> str:
    """A method as people call it; its name in the file where it is not known here."""
    return find_options(name).title if name in method_names() else name


def method_scalars(name: str) -> dict[str, Scalar]:
    """Descriptions of a method's own scalars; empty for a method that is not known here."""
    return find_options(name).explained if name in method_names() else {}


class Glossary:
    """Descriptions of the curves of some runs, by the methods that trained them."""

    def __init__(self, methods: Iterable[str]) -> None:
        own: dict[str, Scalar] = {}
        for method in dict.fromkeys(methods):
            for name, scalar in method_scalars(method).items():
                own[name] = _joined(own[name], scalar) if name in own else scalar
        loss = {"loss": own.pop("loss")} if "loss" in own else {}
        self.scalars = _FIRST | loss | own | _LAST

    def title(self, name: str) -> str:
        """Title of a curve; its name in the file where it is not known here."""
        known = self.scalars.get(name)
        return known.title if known else name.replace("_", " ")

    def meaning(self, name: str) -> str:
        """Meaning of a curve, in a sentence or two; empty for one not known here."""
        known = self.scalars.get(name)
        return known.meaning if known else ""

    def ordered(self, names: list[str]) -> list[str]:
        """Names in the order in which they are shown; those not known here last, as given."""
        known = [name for name in self.scalars if name in names]
        return known + [name for name in names if name not in self.scalars]


def _joined(one: Scalar, other: Scalar) -> Scalar:
    """A number that two methods log under one name."""
    same = other.meaning in one.meaning
    return one if same else one._replace(meaning=f"{one.meaning} / {other.meaning}")
