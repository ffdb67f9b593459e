"""The parts of a report on one run: what stands in its head, its tables and its map."""

from __future__ import annotations

import json
from dataclasses import asdict
from statistics import median
from typing import Any

import yaml

from ssl_vit.config import UserError
from ssl_vit.evaluators.finetune import FinetuneConfig
from ssl_vit.methods.base import find_method
from ssl_vit.options import flatten, to_yaml
from ssl_vit.reporting.advice import CALLED, advise
from ssl_vit.reporting.charts import confusion, landscape
from ssl_vit.reporting.images import stages, thumbnail_uri
from ssl_vit.reporting.landscape import flattened, read_projection
from ssl_vit.reporting.story import Scored, Story
from ssl_vit.session import PretrainConfig, default_options
from ssl_vit.training.metrics import duration

_CALLED = {"knn": "k-NN", "linear": "linear probe", "finetune": "fine-tuning"}
_MOST_CONFUSED = 40
_OTHERS = ("raw pixels", "random encoder", "initial encoder")
_NOTHING = "-"


def part_of(story: Story, colour: str, seed: int) -> dict[str, Any]:
    """Everything of one run that the page shows, ready for its template."""
    made_map = _map(story, seed)
    shown = stages(story)
    return {
        "name": story.name,
        "colour": colour,
        "folder": str(story.run.folder),
        "state": story.run.state,
        "lead": lead(story),
        "tiles": tiles(story),
        "advice": [asdict(advice) for advice in advise(story)],
        "stages": shown,
        "map": made_map,
        "scores": [score_row(scored) for scored in story.scores],
        "cards": cards(story.scores),
        "confusion": _confusion(story),
        "options": options(story),
        "versions": _versions(story),
        "problems": story.problems,
    }


def lead(story: Story) -> str:
    """The run in a sentence."""
    run, config = story.run, story.run.config
    kinds = {"mae": "MAE", "dino": "DINO", "": "A run of an unknown method"}
    method = kinds.get(run.method, run.method)
    parts = [f"{method} on {config.get('data.train', 'unknown images')}"]
    arch = config.get("encoder.arch")
    if arch:
        changed = {"patch": config.get("encoder.patch_size"), "depth": config.get("encoder.depth")}
        more = "".join(f", {name} {value}" for name, value in changed.items() if value)
        parts.append(f"{arch}{more}")
    total = f" of {run.total:,}" if run.total else ""
    parts.append(f"{story.images:,} images seen in {run.step:,}{total} steps")
    return "; ".join(parts) + "."


def tiles(story: Story) -> list[dict[str, str]]:
    """The numbers that people ask for first, each with a note."""
    run, status = story.run, story.run.status
    knn = run.knn
    found = [
        _tile("k-NN", f"{knn[1]:.1f} %", _feature(knn[0]))
        if knn
        else _tile("k-NN", _NOTHING, "no labels, or not yet looked"),
        _probe_tile(story),
        _tile("images seen", f"{story.images:,}", _epochs(story)),
        _tile(
            "time",
            duration(float(story.seconds[-1])) if len(story.steps) else _NOTHING,
            _where(story),
        ),
    ]
    rates = [value for _, value in run.series("images_per_s")]
    found.append(
        _tile("images/s", f"{median(rates):,.0f}" if rates else _NOTHING, "median of all lines")
    )
    joules = story.total("energy_j")
    if joules is not None:
        each = f"{joules / max(1, story.images):.3g} J an image"
        found.append(_tile("energy", f"{joules / 3.6e6:.3g} kWh", each))
    else:
        found.append(_tile("energy", _NOTHING, "no device told"))
    if status and status.job:
        found.append(_tile("job", status.job, "Slurm"))
    return found


def _feature(name: str) -> str:
    """``knn20_cls`` as people say it."""
    k, _, pooling = name.removeprefix("knn").partition("_")
    return f"k = {k}, {CALLED.get(pooling, pooling)}"


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _probe_tile(story: Story) -> dict[str, str]:
    """The linear score of the run's own encoder: the closing one, else the best measured."""
    own = [
        s
        for s in story.scores
        if s.evaluator in ("linear", "finetune")
        and "top1" in s.score.metrics
        and s.of not in _OTHERS
    ]
    if not own:
        return _tile("linear probe", _NOTHING, "not measured")
    best = max(own, key=lambda s: (bool(s.of), s.score.top1))
    low, high = best.score.interval
    label = _CALLED[best.evaluator]
    return _tile(label, f"{best.score.top1:.1f} %", f"95 %: {low:.1f} to {high:.1f}")


def _epochs(story: Story) -> str:
    per = story.run.steps_per_epoch
    return f"{story.run.step / per:.3g} epochs" if per else "epochs unknown"


def _where(story: Story) -> str:
    status = story.run.status
    if not status:
        return "saving and looking included"
    processes = f"{status.processes} processes x " if status.processes > 1 else ""
    threads = f"{status.threads} threads" if status.threads > 1 else "1 thread"
    return f"{status.device}, {processes}{threads}"


def score_row(scored: Scored) -> dict[str, str]:
    """A line of the table of scores."""
    score = scored.score
    first, *rest = score.metrics
    low, high = score.interval
    return {
        "of": scored.of or score.features,
        "evaluator": _CALLED.get(scored.evaluator, scored.evaluator),
        "setting": f"{score.features}, {score.setting}" if scored.of else score.setting,
        "metric": first,
        "value": f"{score.metrics[first]:.2f}",
        "interval": f"{low:.1f} to {high:.1f}",
        "more": ", ".join(f"{name} {score.metrics[name]:.1f}" for name in rest),
        "file": scored.file.name,
    }


def cards(scores: list[Scored]) -> list[dict[str, str]]:
    """The protocol of each result file, as JSON for people."""
    by_file = {scored.file: scored for scored in scores}
    return [
        {"file": file.name, "text": json.dumps(scored.card, indent=1)}
        for file, scored in by_file.items()
    ]


def _confusion(story: Story) -> dict[str, Any] | None:
    """Which class is taken for which by the best linear score of the run's own encoder."""
    own = [s for s in story.scores if s.of not in _OTHERS and s.score.confusion]
    own = [s for s in own if s.evaluator in ("linear", "finetune")] or own
    if not own:
        return None
    best = max(own, key=lambda s: s.score.metrics.get("top1", 0.0))
    counts, names = best.score.confusion, list(best.score.per_class)
    assert counts is not None
    if len(counts) > _MOST_CONFUSED:
        return None
    if len(names) != len(counts):
        names = [str(i) for i in range(len(counts))]
    called = _CALLED.get(best.evaluator, best.evaluator)
    return {"chart": confusion(counts, names), "by": f"{called}, {best.score.features}"}


def _map(story: Story, seed: int) -> dict[str, Any]:
    """The map of held-out images, or why there is none."""
    try:
        found = read_projection(story.run.folder)
    except UserError as error:
        story.problems.append(str(error))
        return {"missing": str(error)}
    if found is None and story.run.method == "finetune":
        return {"missing": "a fine-tuning keeps none; its encoder's own run does"}
    if found is None:
        return {
            "missing": "this run has not yet looked at its encoder, or was made before it kept this"
        }
    flat = flattened(found.features, seed)
    points = [
        {
            "x": round(float(x), 3),
            "y": round(float(y), 3),
            "image": thumbnail_uri(picture),
            **({"label": found.labels[i]} if found.labels else {}),
        }
        for i, ((x, y), picture) in enumerate(zip(flat, found.pictures, strict=True))
    ]
    labelled = found.labels is not None
    return {
        "chart": landscape(points, labelled),
        "images": len(points),
        "step": found.step,
        "labelled": labelled,
    }


def options(story: Story) -> list[dict[str, Any]]:
    """Each option with its value and default; those that differ first."""
    before = defaults(story)
    rows = [
        {
            "name": f"--{key.replace('_', '-')}",
            "value": _plain(value),
            "default": _plain(before[key]) if key in before else "",
            "differs": key in before and before[key] != value,
        }
        for key, value in story.run.config.items()
    ]
    return sorted(rows, key=lambda row: not row["differs"])


def defaults(story: Story) -> dict[str, Any]:
    """The options of a run's method as they are when nothing is said; empty for an unknown one."""
    try:
        if story.run.method == "finetune":
            made: Any = FinetuneConfig()
        else:
            made = default_options(PretrainConfig, find_method(story.run.method))
    except UserError:
        return {}
    return flatten(yaml.safe_load(to_yaml(made)))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "(none)"
    return "(none)" if value in ("", None) else str(value)


def _versions(story: Story) -> str:
    status = story.run.status
    return (
        ", ".join(f"{name} {version}" for name, version in status.versions.items())
        if status
        else ""
    )
