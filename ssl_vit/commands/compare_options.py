"""Options of a comparison of encoders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from ssl_vit.commands.cli import find_recipe, layered, split_config
from ssl_vit.commands.eval_options import EvalData
from ssl_vit.common.errors import check
from ssl_vit.common.reading import beside

PROG = "python -m ssl_vit.evaluate compare"

Evaluator = Literal[
    "knn", "linear", "logreg", "attentive", "retrieval", "segment", "depth", "detect", "finetune"
]
"""Evaluators that encoders are compared by; what runs each is in ``comparing``."""
_KINDS = {"segment": "pairs", "depth": "depth", "detect": "coco"}


@dataclass(frozen=True)
class CompareConfig:
    """Comparison of several encoders by the same evaluators and images: a table, CSV and chart."""

    config: str = ""
    """A YAML file of these options. The command line wins."""
    data: EvalData = field(default_factory=EvalData)
    encoders: tuple[str, ...] = ()
    """Encoders as for --encoder of the other evaluators, each optionally named as NAME=ENCODER."""
    evaluators: tuple[Evaluator, ...] = ("knn", "linear")
    """knn: k = 20, with the pooling that is best by leave-one-out on 5,000 training images.
    linear: the fast protocol. logreg: logistic regression. attentive: one query. retrieval: with
    the pooling of knn. segment, depth, detect: of pairs:, depth: and coco: alone. finetune: with
    --recipe."""
    recipe: str = ""
    """A YAML file of options for finetune or detect, or a recipe by name. It trains encoders with
    random weights from scratch."""
    size: tuple[int, ...] = ()
    """Image size, as for the other evaluators."""
    out: str = "compare"
    """Folder for the table (compare.csv, compare.png), all cards (compare.json) and fine-tuning
    runs, which are resumed if they were stopped."""
    seed: int = 0
    """Random seed, as for the other evaluators."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision, as for the other evaluators."""

    def __post_init__(self) -> None:
        check(bool(self.encoders), "--encoders is missing; one or more, as --encoder elsewhere")
        check(
            bool(self.evaluators),
            "--evaluators is empty; allowed: " + ", ".join(get_args(Evaluator)),
        )
        both = {"finetune", "detect"} <= set(self.evaluators)
        check(not both, "--evaluators has finetune and detect, whose images differ: give one")
        needs = "finetune" in self.evaluators
        check(bool(self.recipe) or not needs, "--evaluators has finetune; --recipe is missing")


def named(encoders: tuple[str, ...]) -> dict[str, str]:
    """Encoders by their names in the table.

    Raises:
        UserError: two have the same name.
    """
    found: dict[str, str] = {}
    for text in encoders:
        name, _, spec = text.rpartition("=")
        name = name or spec
        check(name not in found, f"--encoders has {name!r} twice; give names as NAME={spec}")
        found[name] = spec
    return found


def parse_options(argv: list[str]) -> CompareConfig:
    """Options: defaults < YAML < command line.

    Raises:
        UserError: a mistake in them, or none where one is needed.
    """
    configs, flags = split_config(argv)
    files = [find_recipe(c) for c in configs]
    about = CompareConfig.__doc__ or ""
    default = CompareConfig(encoders=("",))
    config = layered(default, files, flags, PROG, about, CompareConfig)
    check(any(config.encoders), "--encoders is missing; one or more, as --encoder elsewhere")
    for spec in ("train", "val"):
        check(bool(getattr(config.data, spec)), f"--data.{spec} is missing")
    named(config.encoders)
    check_kinds(config)
    return config


def check_kinds(config: CompareConfig) -> None:
    """Check that the images are of the kind that every evaluator needs.

    Raises:
        UserError: of one they are not.
    """
    spec = config.data.train
    own = beside(spec)
    for evaluator in config.evaluators:
        needed = _KINDS.get(evaluator, "")
        either = evaluator == "finetune" and own in ("pairs", "depth")
        kind = f"images named as {needed}:..." if needed else "images with classes"
        check(
            needed == own or either,
            f"--evaluators has {evaluator}, which needs {kind}; --data.train is {spec!r}: one kind "
            "of images a table",
        )
