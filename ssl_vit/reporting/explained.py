"""What each logged number means, and how it should move."""

from __future__ import annotations

# Name: title, what it says. Order is that of the page.
EXPLAINED = {
    "loss": (
        "Loss",
        "What is minimised. MAE's falls steadily; DINO's may rise while the features get better, "
        "as its target moves.",
    ),
    "knn": (
        "k-NN accuracy, %",
        "Held-out images classified by their nearest training images, on frozen features: the "
        "number to watch. It should rise, and pass raw pixels.",
    ),
    "feature_std": (
        "Feature spread",
        "1: features spread evenly over the sphere; 0: every image has the same. A fall towards 0 "
        "is a collapse.",
    ),
    "rankme": (
        "Effective rank",
        "How many directions the features use (RankMe). Higher is mostly better; near 1 all images "
        "lie on a line.",
    ),
    "teacher_entropy_share": (
        "Teacher's entropy, share of the largest",
        "1: the teacher says the same of every image; 0: it is certain. It should settle between.",
    ),
    "teacher_entropy": ("Teacher's entropy", "In nats; its largest value is ln of the prototypes."),
    "kl": (
        "KL(teacher || student)",
        "What the student has yet to learn: the loss without the teacher's entropy. 0 for long is "
        "a collapse.",
    ),
    "prototypes_used": (
        "Prototypes in use",
        "How many prototypes a batch is spread over. 1 is a collapse.",
    ),
    "center_norm": ("Norm of the centre", "It grows, then settles."),
    "val_top1": ("Accuracy on held-out images, %", "Of the network as it is being fine-tuned."),
    "val_top5": ("Top-5 accuracy on held-out images, %", "Its class among the five best guesses."),
    "grad_norm": (
        "Gradient norm",
        "Before clipping. Single peaks are normal; a steady climb asks for a lower rate.",
    ),
    "lr": ("Learning rate", "Warm-up, then half a cosine."),
    "images_per_s": ("Images per second", "Over all processes, without saving and looking."),
    "waiting": (
        "Share of the time waiting for images",
        "Above a fifth the loader holds the training up.",
    ),
    "energy_j": ("Energy, joules a line", "Of GPUs and processors that count it themselves."),
}


_FEATURES = {"cls": "[CLS]", "mean": "mean patch"}
_EVALUATORS = {"knn": "k-NN", "linear": "linear probe", "finetune": "fine-tuning"}


def feature(name: str) -> str:
    """A feature as people call it."""
    return _FEATURES.get(name, name)


def neighbours_of(name: str) -> str:
    """What a k-NN number is of: ``knn20_cls`` is ``k = 20, [CLS]``."""
    k, _, pooling = name.removeprefix("knn").partition("_")
    return f"k = {k}, {feature(pooling)}"


def evaluator(name: str) -> str:
    """An evaluator as people call it."""
    return _EVALUATORS.get(name, name)


def title(name: str) -> str:
    """What a curve is called; its name in the file where it is not known here."""
    return EXPLAINED.get(name, (name.replace("_", " "), ""))[0]


def meaning(name: str) -> str:
    """What a curve says, in a sentence or two; empty for one not known here."""
    return EXPLAINED.get(name, ("", ""))[1]


def ordered(names: list[str]) -> list[str]:
    """Names in the order in which they are shown; those not known here last, as given."""
    known = [name for name in EXPLAINED if name in names]
    return known + [name for name in names if name not in EXPLAINED]
