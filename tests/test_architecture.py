"""The import rule of the package, and that nothing it loads can execute, read off the source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ssl_vit"

# From the ground up: a folder imports from its own floor or below. A module on the root of the
# package is a door, or the library's own face for notebooks.
FLOORS = (
    {"common"},
    {"options"},
    {"data", "model"},
    {"objectives"},
    {"weights", "pictures"},
    {"methods", "training"},
    {"records"},
    {"evaluators"},
    {"benchmarks"},
    {"commands", "reporting"},
)
DOORS = len(FLOORS)
ROOT_MODULES = {"api"}
FORBIDDEN = {("methods", "training"), ("training", "methods"), ("evaluators", "methods")}
# Those that may speak to other processes themselves.
COLLECTIVES = ("ssl_vit.common.distributed", "ssl_vit.training.")
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def part_of(module: str) -> str:
    """``ssl_vit.data.tar`` -> ``data``; the package itself is an empty string."""
    return [*module.removesuffix(".__init__").split("."), ""][1]


def is_door(tree: ast.Module) -> bool:
    """Whether the module has ``if __name__ == "__main__"``."""
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in tree.body
    )


def floor_of(part: str, doors: set[str]) -> int | None:
    """The floor of a part of the package; None for one that has no place in the house."""
    if part in doors | ROOT_MODULES:
        return DOORS
    return next((i for i, floor in enumerate(FLOORS) if part in floor), None)


def is_module_name(node: ast.AST) -> bool:
    """Whether a node is "ssl_vit.data.tar" or the like, which ``import_module`` may be given."""
    text = node.value if isinstance(node, ast.Constant) else None
    return isinstance(text, str) and re.fullmatch(r"ssl_vit(\.\w+)+", text) is not None


def imported(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module) of all that is imported, at any depth, by statement or by a string's name."""
    package = module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif is_module_name(node):
            yield node.lineno, node.value


def violations(module: str, source: str, doors: set[str]) -> list[str]:
    """What a module imports against the rule."""
    tree, part, found = ast.parse(source), part_of(module), []
    own = floor_of(part, doors | ({part} if is_door(tree) else set()))
    if own is None and part:
        return [f"{module}: {part!r} has no floor; say in FLOORS where it belongs"]
    for line, name in imported(module, tree):
        other = part_of(name)
        if name.split(".")[0] == "ssl_vit" and other and part:
            floor = floor_of(other, doors)
            # `from ssl_vit.data import x` also yields ssl_vit.data itself, so a name that is no
            # module (ssl_vit.__version__) is the only one without a floor.
            if (floor or 0) > (own or 0) or (part, other) in FORBIDDEN:
                found.append(f"{module}:{line} imports {name}")
        if name.startswith("torch.distributed") and not module.startswith(COLLECTIVES):
            found.append(f"{module}:{line} imports {name}; use ssl_vit.common.distributed")
    return sorted(set(found))


def dangers(name: str, source: str) -> list[str]:
    """Ways in which loading a file could execute what is in it."""
    tree, found = ast.parse(source), []
    for line, module in imported(name, tree):
        if module.split(".")[0] in PICKLES:
            found.append(f"{name}:{line} imports {module}")
        if module in ("torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            found.append(f"{name}:{line} imports {module}; call it by its full name")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        bad = (
            (called == "torch.load" and given.get("weights_only") != "True")
            or (called.startswith("yaml.") and "load" in called and called != "yaml.safe_load")
            or given.get("allow_pickle", "False") != "False"
            or called in ("eval", "exec")
        )
        if bad:
            found.append(f"{name}:{node.lineno} calls {called}")
    return found


def module_name(path: Path) -> str:
    """``ssl_vit/data/tar.py`` -> ``ssl_vit.data.tar``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
LAUNCHERS = {
    str(p.relative_to(ROOT)): p.read_text() for p in sorted((ROOT / "launch").glob("*.py"))
}
OWN_DOORS = {part_of(name) for name, source in MODULES.items() if is_door(ast.parse(source))}


def test_the_package_was_read():
    assert len(MODULES) > 20
    assert "pretrain" in OWN_DOORS


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_floors(module):
    assert violations(module, MODULES[module], OWN_DOORS) == []


def test_doors_are_modules_of_the_package_itself():
    """A module deeper in the house that runs on its own would escape the rule."""
    inner = [n for n, source in MODULES.items() if n.count(".") > 1 and is_door(ast.parse(source))]
    assert inner == []


def test_a_module_on_the_root_is_a_door_or_the_api():
    root = {part_of(name) for name in MODULES if name.count(".") == 1} - {""}
    assert root - OWN_DOORS - ROOT_MODULES == {p for p in root if (PACKAGE / p).is_dir()}


def test_every_folder_has_one_floor():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert sorted(part for floor in FLOORS for part in floor) == sorted(folders)


def arrows(modules: dict[str, str]) -> set[tuple[str, str]]:
    """The pairs of rooms (folders, and modules of the root) of which one imports the other."""
    pairs = set()
    for module, source in modules.items():
        for _, name in imported(module, ast.parse(source)):
            if name.split(".")[0] == "ssl_vit" and part_of(module) and part_of(name):
                pairs.add((part_of(module), part_of(name)))
    rooms = {part_of(name) for name in modules}
    return {(a, b) for a, b in pairs if a != b and b in rooms}


def test_rooms_do_not_know_each_other_without_need():
    """The count is what a newcomer has to hold in mind; a rise should be worth it."""
    assert len(arrows(MODULES)) <= 83


@pytest.mark.parametrize("name", [*MODULES, *LAUNCHERS])
def test_nothing_loaded_can_execute(name):
    assert dangers(name, MODULES.get(name) or LAUNCHERS.get(name) or "") == []


def test_usable_cores_are_asked_for_in_one_place():
    asking = [n for n, source in (MODULES | LAUNCHERS).items() if "sched_getaffinity" in source]
    assert asking == ["ssl_vit.common.waiting"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ssl_vit.model.encoder", "from ssl_vit.methods.mae import MAE"),
        ("ssl_vit.model.encoder", "from ssl_vit.weights import exchange"),
        ("ssl_vit.data.order", "from ssl_vit.objectives import ema"),
        ("ssl_vit.records.status", "from ssl_vit.evaluators import knn"),
        ("ssl_vit.methods.mae", "from ssl_vit.records.status import recorded"),
        ("ssl_vit.benchmarks.step", "from ssl_vit.commands import cli"),
        ("ssl_vit.commands.cli", "import ssl_vit.api"),
        ("ssl_vit.common.config", "def late():\n    import ssl_vit.model.encoder"),
        ("ssl_vit.methods.mae", "from ssl_vit.training.loop import Trainer"),
        ("ssl_vit.methods.mae", "from ..training import loop"),
        ("ssl_vit.methods.mae", "from ssl_vit import training"),
        ("ssl_vit.methods.__init__", "from . import x\nfrom ..training import loop"),
        ("ssl_vit.training.loop", "from ssl_vit.methods.base import Method"),
        ("ssl_vit.training.loop", "from ssl_vit.evaluators.knn import accuracy"),
        ("ssl_vit.training.loop", "from ssl_vit.commands.cli import show_table"),
        (
            "ssl_vit.evaluators.knn",
            "if TYPE_CHECKING:\n    from ssl_vit.methods import mae",
        ),
        ("ssl_vit.evaluators.knn", "importlib.import_module('ssl_vit.methods.mae')"),
        ("ssl_vit.evaluators.knn", "import ssl_vit.pretrain as door"),
        ("ssl_vit.data.tar", "from ssl_vit.evaluators import knn"),
        ("ssl_vit.methods.dino", "import torch.distributed as dist"),
        ("ssl_vit.evaluators.knn", "from torch import distributed"),
        ("ssl_vit.utils", "import math"),
    ],
)
def test_the_checker_sees_a_violation(module, source):
    assert violations(module, source, {"pretrain"})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "ssl_vit.pretrain",
            "from ssl_vit.methods import base\nfrom ssl_vit.commands import cli",
        ),
        ("ssl_vit.newdoor", "from ssl_vit.evaluators import knn\nif __name__ == '__main__': f()"),
        ("ssl_vit.evaluators.finetune", "from ssl_vit.training.loop import Trainer"),
        ("ssl_vit.data.order", "from ssl_vit.common.seeds import fold\nimport numpy"),
        ("ssl_vit.training.loop", "import torch.distributed as dist"),
    ],
)
def test_the_checker_lets_the_rule_pass(module, source):
    assert violations(module, source, {"pretrain"}) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "from torch import load",
        "import pickle",
        "from pickle import loads",
        "def f():\n    import cloudpickle",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "yaml.full_load_all(text)",
        "np.load(file, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_the_checker_sees_a_danger(source):
    assert dangers("made.up", source)


def test_the_checker_lets_safe_loading_pass():
    source = "torch.load(p, weights_only=True)\nyaml.safe_load(t)\nmodel.eval()\nnp.load(f)"
    assert dangers("made.up", source) == []


NAMELESS = (
    *("ssl_vit.reporting.", "ssl_vit.visualize", "ssl_vit.benchmark", "ssl_vit.training."),
    *("ssl_vit.commands.benchmark", "ssl_vit.commands.device", "ssl_vit.commands.drawing"),
    *("ssl_vit.commands.gallery", "ssl_vit.commands.picture_options"),
    *("ssl_vit.commands.reconstruction", "ssl_vit.commands.scale"),
)
CONTRACT = {p.name: p.read_text() for p in sorted((ROOT / "tests" / "contract").glob("*.py"))}


def named_methods(source: str) -> list[str]:
    """The methods that a module names, in any case: in words of its texts and in identifiers."""
    names = {p.stem for p in (PACKAGE / "methods").glob("[!_]*.py")} - {"base"}
    words = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words |= set(re.findall(r"\w+", node.value.lower()))
        elif isinstance(node, ast.Name | ast.Attribute):
            words.add((node.id if isinstance(node, ast.Name) else node.attr).lower())
    return sorted(words & names)


@pytest.mark.parametrize(
    "module", [m for m in MODULES if m.startswith(NAMELESS) and ".peers_" not in m]
)
def test_what_serves_every_method_names_none(module):
    """A method says of itself what these need; what stands beside one is in peers_<method>.py."""
    assert named_methods(MODULES[module]) == []


@pytest.mark.parametrize("file", CONTRACT)
def test_the_contract_names_no_method(file):
    """It is every method's; what is of one stands in unit/methods."""
    assert named_methods(CONTRACT[file]) == []


def test_a_named_method_is_seen():
    assert named_methods("if run.method == 'mae':\n    pass") == ["mae"]
    assert named_methods('"""What DINO logs."""') == ["dino"]
    assert named_methods("kind = methods.MAE") == ["mae"]


# A word that names no thing; "In-place" does.
NO_THING = re.compile(
    r"(What|Whether|That|Those|This|These|As|Of|Where|When|Why|How|Which|Who|Whose|Whom|Its|It|Their"
    r"|From|For|In|Without|Inside|Such|Say|Tell)(?![\w-])"
)


def nameless_docstrings(source: str) -> list[str]:
    """Docstrings, those of fields included, that begin with a word that names no thing."""
    found = []
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)  # of a lambda, one expression
        for part in body if isinstance(body, list) else []:
            value = part.value if isinstance(part, ast.Expr) else None
            text = value.value if isinstance(value, ast.Constant) else None
            if isinstance(text, str) and NO_THING.match(text.strip()):
                found.append(f"{part.lineno}: {text.strip():.40}")
    return found


def test_docstrings_begin_with_the_thing():
    """So that the package can be skimmed and searched."""
    found = {module: nameless_docstrings(source) for module, source in MODULES.items()}
    assert {module: lines for module, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        '"""What a file holds."""',
        'class A:\n    """How it is read."""',
        'def f():\n    """Whether it is."""',
        'async def f():\n    r"""\n    Of these, the first."""',
        'class A:\n    x: int = 0\n    """As for the others."""',
        'X = 0\n"""Which it is."""',
        'def f():\n    def g():\n        """That of f."""',
    ],
)
def test_a_docstring_without_a_thing_is_seen(source):
    assert len(nameless_docstrings(source)) == 1


def test_a_docstring_with_a_thing_passes():
    source = '"""In-place sum, of what size it is."""\nx = f"""What"""\ndef f():\n    return "What"'
    assert nameless_docstrings(source) == []
