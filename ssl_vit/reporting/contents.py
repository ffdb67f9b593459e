"""Report contents of one run: its head, its tables and its map."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssl_vit.commands.pretrain_options import PretrainConfig, default_options
from ssl_vit.common.errors import UserError
from ssl_vit.common.layers import as_written
from ssl_vit.evaluators.score import BEST, UNITS
from ssl_vit.methods import find_options
from ssl_vit.reporting.advice import advise
from ssl_vit.reporting.charts import confusion, landscape
from ssl_vit.reporting.explained import evaluator, feature, method_title
from ssl_vit.reporting.images import stages, thumbnail_uri
from ssl_vit.reporting.landscape import flattened, read_projection
from ssl_vit.reporting.story import TUNED, Scored, Story
from ssl_vit.reporting.tiles import tiles

_MOST_CONFUSED = 40


def part_of(story: Story, colour: str, seed: int) -> dict[str, Any]:
    """Everything of one run that the page shows, ready for its template."""
    made_map = _map(story, seed)
    shown = stages(story)
    return {
        "name": story.name,
        "colour": colour,
        "folder": str(story.run.folder),
        "quoted": shlex.quote(str(story.run.folder)),
        "kept": story.run.method not in TUNED,
        "state": story.run.state,
        "lead": lead(story),
        "tiles": tiles(story),
        "advice": [asdict(advice) for advice in advise(story)],
        "stages": shown,
        "map": made_map,
        "scores": [score_row(scored, story.run.folder) for scored in story.scores],
        "cards": cards(story.scores, story.run.folder),
        "confusion": _confusion(story),
        "options": options(story),
        "versions": _versions(story),
        "problems": story.problems,
    }


def lead(story: Story) -> str:
    """The run in a sentence."""
    run, config = story.run, story.run.config
    method = method_title(run.method) if run.method else "A run of an unknown method"
    parts = [f"{method} on {config.get('data.train', 'unknown images')}"]
    arch = config.get("encoder.arch")
    if arch:
        changed = {"patch": config.get("encoder.patch_size"), "depth": config.get("encoder.depth")}
        more = "".join(f", {name} {value}" for name, value in changed.items() if value)
        parts.append(f"{arch}{more}")
    elif config.get("encoder"):
        parts.append(f"beginning with {config['encoder']}")
    total = f" of {run.total:,}" if run.total else ""
    seen = "" if story.images is None else f"{story.images:,} images seen in "
    parts.append(f"{seen}{run.step:,}{total} steps")
    return "; ".join(parts) + "."


def score_row(scored: Scored, folder: Path) -> dict[str, str]:
    """A line of the table of scores in the report on a run's folder."""
    score, step = scored.score, _step(scored, folder)
    first, *rest = score.metrics
    low, high = score.interval
    return {
        "of": scored.of or feature(score.features),
        "evaluator": evaluator(scored.evaluator),
        "setting": f"{feature(score.features)}, {score.setting}" if scored.of else score.setting,
        "metric": first,
        "value": f"{scored.first:.2f}",
        "interval": f"{low:.1f} to {high:.1f}",
        "more": ", ".join(f"{n} {score.metrics[n]:.{4 if n in UNITS else 1}f}" for n in rest),
        "step": f"{step:,}" if isinstance(step, int) else "",
        "file": scored.file.relative_to(folder).as_posix(),
    }


def _step(scored: Scored, folder: Path) -> Any:
    """Step that a score is of: the encoder's or, of what this run itself has tuned, the run's."""
    if scored.evaluator in TUNED and scored.file.parent == folder:
        return scored.card.get("step")
    encoder = scored.card.get("encoder")
    last = scored.own and not scored.of.startswith(BEST)  # that one's step is in its name
    return encoder.get("step") if isinstance(encoder, dict) and last else None


def cards(scores: list[Scored], folder: Path) -> list[dict[str, str]]:
    """The protocol of each result file of a run's folder, as JSON for people."""
    by_file = {scored.file: scored for scored in scores}
    return [
        {"file": file.relative_to(folder).as_posix(), "text": json.dumps(scored.card, indent=1)}
        for file, scored in by_file.items()
    ]


def _confusion(story: Story) -> dict[str, Any] | None:
    """Confusion matrix of the trained encoder: of the closing score, else the first."""
    own = [s for s in story.scores if s.own and s.score.confusion]
    own = [s for s in own if s.evaluator in ("linear", "finetune")] or own
    if not own:
        return None
    scored = next((s for s in own if s.of), own[0])
    counts, names = scored.score.confusion, list(scored.score.per_class)
    assert counts is not None
    by = f"{evaluator(scored.evaluator)}, {feature(scored.score.features)}, {scored.file.name}"
    if len(counts) > _MOST_CONFUSED:
        return {"by": by, "missing": f"{len(counts)} classes are too many for one"}
    if len(names) != len(counts):  # some have no image
        names = [str(i) for i in range(len(counts))]
    return {"chart": confusion(counts, names), "by": by}


def _map(story: Story, seed: int) -> dict[str, Any]:
    """The map of held-out images, or why there is none."""
    try:
        found = read_projection(story.run.folder)
    except UserError as error:
        story.problems.append(str(error))
        return {"missing": str(error)}
    if found is None and story.run.method in TUNED:
        return {"missing": "a fine-tuning keeps none; its encoder's own run does"}
    if found is None:
        return {
            "missing": "this run has not yet probed its encoder, or was made before it kept this"
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
        "chart": landscape(points, labelled, found.classes),
        "images": len(points),
        "step": found.step,
        "labels": ("" if found.classes else "; each has several labels")
        if labelled
        else "; they have no labels",
    }


def options(story: Story) -> list[dict[str, Any]]:
    """Options, each with its value and default; those that differ first."""
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
    """The options of a run's method as they are by default; empty for an unknown one, and
    for a fine-tuning, whose defaults are by its encoder."""
    try:
        made = default_options(PretrainConfig, find_options(story.run.method))
    except UserError:
        return {}
    return as_written(made)


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
