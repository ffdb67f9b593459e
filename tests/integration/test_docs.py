"""README, docs/ and the headers of recipes: links lead somewhere, commands parse, numbers agree.

No command is run: each is given to the parser of its door, which refuses what it does not know.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import slurm
from launch.options import LaunchConfig, merge_lists
from ssl_vit import benchmark, evaluate, pretrain, report
from ssl_vit.commands import (
    detection_options,
    device_options,
    quality_options,
    rescoring,
    scenes_options,
)
from ssl_vit.commands.cli import layered, recipes, split_config, subcommand
from ssl_vit.commands.compare_options import CompareConfig
from ssl_vit.commands.detect_options import DetectConfig
from ssl_vit.commands.embed_options import EmbedConfig
from ssl_vit.commands.export_options import ExportConfig
from ssl_vit.commands.picture_options import PICTURES
from ssl_vit.commands.probe_options import PROBES
from ssl_vit.commands.rescoring import TUNED
from ssl_vit.common.errors import UserError
from ssl_vit.common.layers import COMMAND_LINE, parse
from ssl_vit.evaluators.options import FinetuneConfig
from ssl_vit.methods import method_names
from ssl_vit.runs import RunsConfig
from tests.conftest import ROOT
from tests.contract.tiny import encoder_file

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_DOOR = re.compile(r"^(?:ssl_vit\.(\w+)|launch\.slurm)$")
_NUMBER = re.compile(r"\d+\.\d")


def commands(page: Path) -> list[list[str]]:
    """Every call of a door or of the launcher on a page, or in a recipe's header, as arguments from
    the module's name on."""
    text = page.read_text().replace("\\|", "|")
    if page.suffix == ".yaml":
        lines = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
        pieces = ["\n".join(lines)]
    else:
        pieces = [body for _, body in _FENCE.findall(text)]
        pieces += re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))
    joined = "\n".join(pieces).replace("\\\n", " ")
    return list(filter(None, map(_call, joined.splitlines())))


def _call(line: str) -> list[str]:
    """``line`` from ``ssl_vit.DOOR`` or ``launch.slurm`` on, if it starts one."""
    if " -m ssl_vit." not in line and " -m launch." not in line:
        return []
    words = shlex.split(line, comments=True)
    at = next(i for i in range(1, len(words)) if words[i - 1] == "-m" and "." in words[i])
    return words[at:]


def check_command(call: list[str]) -> None:
    """Refuse what the door would refuse before it looks at a file.

    Raises:
        UserError: no such door, subcommand, recipe, option or value.
    """
    if call in (["ssl_vit.NAME"], ["launch.slurm"]):  # doors in general
        return
    found = _DOOR.match(call[0])
    assert found, f"{call[0]} is no door"
    argv = [word for word in call[1:] if word not in ("--help", "...")]
    if found[1] is None:
        cut = argv.index("--")
        parse(LaunchConfig(), merge_lists(argv[:cut]), COMMAND_LINE, "launch")
        assert argv[cut + 1] in slurm.DOORS, argv[cut + 1]
        check_command([f"ssl_vit.{argv[cut + 1]}", *argv[cut + 2 :]])
    else:
        _PARSERS[found[1]](argv)


def _pretrain(argv: list[str]) -> None:
    if "--init.encoder" in argv:  # another file, which is there
        at = argv.index("--init.encoder")
        argv = [*argv[: at + 1], str(encoder_file()), *argv[at + 2 :]]
    pretrain.parse_options(argv)


def _evaluate(argv: list[str]) -> None:
    others = {
        "finetune": FinetuneConfig(),
        "detect": DetectConfig(),
        "compare": CompareConfig(encoders=("",)),
    }
    name = subcommand(argv, "", "evaluator", [*PROBES, *others, "again"])
    if name == "again":
        kind = Path(argv[1]).stem
        assert kind in TUNED or not argv[2:]
        if kind in TUNED:
            rescoring.check_flags(argv[2:])
            _parse(TUNED[kind](), argv[2:])
        return
    default = others[name] if name in others else PROBES[name]()
    _parse(default, evaluate.split_lists(argv[1:]))


def _visualize(argv: list[str]) -> None:
    name = subcommand(argv, "", "picture", list(PICTURES))
    _parse(PICTURES[name](), argv[1:])


def _benchmark(argv: list[str]) -> None:
    others = {
        "detection": detection_options,
        "quality": quality_options,
        "device": device_options,
        "scenes": scenes_options,
    }
    if argv[0] in others:
        others[argv[0]].parse_options(argv[1:])
    else:
        benchmark.parse_options(argv)


def _runs(argv: list[str]) -> None:
    flags = [word for flag in argv for word in ([flag, "True"] if flag == "--live" else [flag])]
    parse(RunsConfig(), flags, COMMAND_LINE, "runs")


def _parse(default: object, argv: list[str]) -> None:
    configs, flags = split_config(argv)
    layered(default, [recipes()[name] for name in configs], flags, "", "", type(default))


_PARSERS = {
    "pretrain": _pretrain,
    "evaluate": _evaluate,
    "visualize": _visualize,
    "export": lambda argv: _parse(ExportConfig(), argv),
    "embed": lambda argv: _parse(EmbedConfig(), argv),
    "benchmark": _benchmark,
    "report": lambda argv: parse(report.ReportConfig(), argv, COMMAND_LINE, "report"),
    "runs": _runs,
}


def all_commands() -> Iterator[object]:
    for page in [*PAGES, *recipes().values()]:
        for i, call in enumerate(commands(page)):
            yield pytest.param(call, id=f"{page.name}-{i}")


@pytest.mark.parametrize("call", list(all_commands()))
def test_a_command_parses(call):
    check_command(call)


def test_every_page_with_commands_was_read():
    """The search for commands finds those that are there, whatever their layout."""
    found = {page.stem: len(commands(page)) for page in PAGES}
    assert found["README"] >= 10
    assert all(found[p] >= 2 for p in ("evaluation", "cluster", "speed", "scale", "measured"))
    assert all(commands(recipe) for recipe in recipes().values())


@pytest.mark.parametrize(
    "line",
    [
        "python -m ssl_vit.pretrain mae --optim.batchsize 64",
        "python -m ssl_vit.pretrain mea",
        "python -m ssl_vit.pretrain mae --config mae_vit_b61",
        "python -m ssl_vit.evaluate linear --protocol dinov3",
        "python -m ssl_vit.export --too timm",
        "python -m ssl_vit.embed --out features.csv",
        "torchrun --nproc-per-node 8 -m ssl_vit.visualize attention --masse 1",
        "python -m launch.slurm --node 4 -- pretrain mae",
        "python -m launch.slurm --nodes 4 -- pretrain mae --optim.rl 1",
        "python -m ssl_vit.runs runs --alive",
    ],
)
def test_a_misspelt_command_is_refused(line):
    with pytest.raises((UserError, KeyError)):
        check_command(_call(line))


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) < 200


def test_every_recipe_and_method_is_listed():
    listed = (ROOT / "docs" / "methods.md").read_text()
    assert [name for name in recipes() if f"../configs/{name}.yaml" not in listed] == []
    for text in (listed, README.read_text()):
        assert [name for name in method_names() if f"| `{name}` |" not in text] == []


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_lead_somewhere(page):
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_named_in_the_readme():
    linked = _LINK.findall(README.read_text())
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in linked] == []


def header(recipe: str) -> dict[str, str]:
    """The parts of a recipe's header (Cost, Expect, ...), each as one line."""
    lines = [line[1:] for line in recipes()[recipe].read_text().splitlines() if line[:1] == "#"]
    parts = re.split(r"^ ([A-Z][\w ()]*?):", "\n".join(lines), flags=re.MULTILINE)[1:]
    return {
        name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


def test_the_printed_table_is_that_of_the_recipe():
    """Numbers of the first run stand in its recipe; the README shows what it prints."""
    said = header("mae_digits")
    rows = dict(re.findall(r"│ ([a-z ]+?) +│(.+)│$", README.read_text(), re.MULTILINE))
    printed = [_NUMBER.findall(rows[n]) for n in ("mae encoder", "random encoder", "raw pixels")]
    assert _NUMBER.findall(said["Expect"]) == [n for row in printed for n in row]
    assert said["Cost"].rstrip(".") in " ".join(README.read_text().split())


@pytest.mark.parametrize("recipe", ["mae_cifar10", "dino_cifar10", "finetune_cifar10"])
def test_scores_of_a_recipe_are_measured(recipe):
    """What a recipe expects is in the tables of docs/measured.md."""
    measured = set(_NUMBER.findall((ROOT / "docs" / "measured.md").read_text()))
    assert set(_NUMBER.findall(header(recipe)["Expect"])) <= measured


def test_operations_of_a_recipe_are_those_of_the_table():
    """FLOPs in the headers of the long recipes are those of docs/scale.md."""
    table = (ROOT / "docs" / "scale.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| \d+ \| (\d\.\d)e\+(\d+) \|", table, re.MULTILINE)
    assert rows
    for recipe, digits, power in rows:
        assert f"{digits}e{power} FLOP" in header(recipe)["Cost"]


def test_speeds_of_the_readme_are_measured():
    """The few ratios that the README names are in the tables."""
    measured = (ROOT / "docs" / "measured.md").read_text()
    faster = re.search(r"\*\*Faster\.\*\*(.*?)\n- ", README.read_text(), re.DOTALL)
    assert faster
    ratios = re.findall(r"\d\.\d+", faster[1])
    assert len(ratios) >= 4
    assert all(f"**{ratio}**" in measured for ratio in ratios)
    same_precision = re.sub(r"huggingface-fp32 [^;|]*", "", measured)
    steps = re.findall(r"\(\*\*(\d\.\d\d)\*\*\)", same_precision)
    assert [min(steps, key=float), max(steps, key=float)] == ratios[:2]
