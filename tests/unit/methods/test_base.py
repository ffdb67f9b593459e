"""What every method has: objectives that are summed, draws in the workers, its own file."""

import pkgutil
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from ssl_vit import methods, options
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.seeds import fold
from ssl_vit.common.task import Views
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.methods import find_options, method_names, method_of
from ssl_vit.methods.base import Method, MethodConfig, find_method
from ssl_vit.objectives.base import Objective

ENCODER = EncoderConfig(
    "vit_tiny_patch16_224", image_size=(8, 12), patch_size=4, width=24, depth=1, heads=2
)


@dataclass(frozen=True)
class TwoConfig(MethodConfig):
    ratio: float = 0.5


class Named(Objective):
    """A loss that is a weight of its own, and notes what it is told."""

    def __init__(self, value: float, encoder=None) -> None:
        super().__init__()
        self.own = torch.nn.Parameter(torch.tensor(value))
        self.told: list = []

    def forward(self, encoder, views, step):
        self.told.append(("forward", encoder, views, step))
        return {"loss": self.own * 1.0, "step": torch.tensor(float(step))}

    def set_length(self, steps, steps_per_epoch):
        self.told.append(("length", steps, steps_per_epoch))

    def encoder_replaced(self, encoder):
        self.told.append(("replaced", encoder))

    def before_update(self, step):
        self.told.append(("before", step))

    def after_update(self, encoder, step, took):
        self.told.append(("after", encoder, step, bool(took)))

    def concerns(self, means):
        self.told.append(("concerns", means))
        return {f"high {v:g}": "too high" for v in means.values() if v > 10}


class Two(Method):
    Config: ClassVar[type] = TwoConfig
    title, explained = "Two", {}

    def __init__(self, config=TwoConfig(), names=("a", "b")) -> None:
        super().__init__(config, ENCODER, 3)
        for name, value, weight in zip(names, (2.0, 5.0), (1.0, 0.25), strict=False):
            self.add(name, Named(value), weight)

    @staticmethod
    def views(config, encoder):
        return ViewSpec((Crop(encoder.image_size),))

    @staticmethod
    def draw(config, grid, rng):
        return {
            "a.mask": rng.random(grid) < config.ratio,
            "b.order": rng.permutation(grid[0] * grid[1]).astype(np.int64),
        }

    def seen_by(self, name, views):
        return views.part(slice(0, 1), name)


def views(b: int = 3) -> Views:
    keys = torch.tensor([fold(i) for i in range(b)])
    drawn = {"a.mask": torch.zeros(b, 2, 3), "b.order": torch.zeros(b, 6)}
    return Views([torch.zeros(b, 3, 8, 12)], keys, torch.full((b,), -1), drawn=drawn)


# --- several objectives -------------------------------------------------------------------------


def test_losses_are_summed_with_their_weights():
    """The gradient too; each objective's scalars, its own loss among them, under its name."""
    method = Two()
    found = method(views(), 7)
    assert {name: float(v.detach()) for name, v in found.items()} == {
        "loss": 2.0 + 0.25 * 5.0,
        "a_loss": 2.0,
        "a_step": 7.0,
        "b_loss": 5.0,
        "b_step": 7.0,
    }
    found["loss"].backward()
    assert method.objectives["a"].own.grad == 1.0
    assert method.objectives["b"].own.grad == 0.25


def test_each_objective_sees_its_part():
    method, batch = Two(), views()
    method(batch, 7)
    for name, own in (("a", "mask"), ("b", "order")):
        (what, encoder, part, step) = method.objectives[name].told[0]
        assert (what, encoder, step) == ("forward", method.encoder, 7)
        assert list(part.drawn) == [own]
        assert part.keys is batch.keys


def test_one_objective_has_no_prefix():
    method = Two(names=("a",))
    assert {k: float(v.detach()) for k, v in method(views(), 3).items()} == {
        "loss": 2.0,
        "step": 3.0,
    }
    assert method.objective is method.objectives["a"]
    assert method.concerns({"loss": 12.0}) == {"high 12": "too high"}
    with pytest.raises(ValueError, match="too many values"):
        _ = Two().objective


def test_concerns_are_each_objectives_own():
    """By the names that it gave its scalars; what is logged beside them is nobody's."""
    method = Two()
    means = {"loss": 3.25, "a_loss": 2.0, "a_step": 11.0, "b_loss": 50.0, "grad_norm": 99.0}
    assert method.concerns(means) == {"high 11": "too high", "high 50": "too high"}
    assert method.objectives["a"].told == [("concerns", {"loss": 2.0, "step": 11.0})]
    assert method.objectives["b"].told == [("concerns", {"loss": 50.0})]


def test_what_happens_is_passed_on():
    method = Two()
    method.set_length(100, 10)
    method.before_update(4)
    method.after_update(4, torch.tensor(False))
    method.begin_with(method.encoder.vit.state_dict(), "here")
    for objective in method.objectives.values():
        assert objective.told == [
            ("length", 100, 10),
            ("before", 4),
            ("after", method.encoder, 4, False),
            ("replaced", method.encoder),
        ]


# --- draws --------------------------------------------------------------------------------------


def test_what_is_drawn_is_a_part_of_the_views():
    """And what evaluation draws for a key is what a worker does."""
    method = Two(TwoConfig(ratio=0.25))
    spec = Two.view_spec(method.config, method.encoder)
    assert spec.crops == Two.views(method.config, method.encoder).crops
    masks = np.stack([spec.draw(np.random.default_rng(i))["a.mask"] for i in range(400)])
    assert masks.shape == (400, 2, 3)
    assert masks.mean() == pytest.approx(0.25, abs=0.05)
    keys = torch.tensor([5, 6, 5])
    found = method.drawn(keys)
    assert {k: (tuple(v.shape), v.dtype) for k, v in found.items()} == {
        "a.mask": ((3, 2, 3), torch.bool),
        "b.order": ((3, 6), torch.int64),
    }
    assert torch.equal(found["b.order"][0], found["b.order"][2])
    assert found["b.order"].sort(1).values.tolist() == [list(range(6))] * 3
    assert torch.equal(method.drawn(keys[1:2])["b.order"][0], found["b.order"][1])


def test_a_method_that_draws_nothing_says_so():
    for name in ("mae", "dino"):
        kind = find_method(name)
        assert kind.draw is Method.draw
        method = kind(kind.Config(), ENCODER, 3)
        assert kind.view_spec(method.config, method.encoder).draw is None


# --- a method's file ----------------------------------------------------------------------------

IMPORTED = "from ssl_vit.methods.mae import MAE\nfrom ssl_vit.methods.base import Method\n"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a module beside the methods that there are, or beside their options."""
    made = []
    for room in (methods, options):
        folder = tmp_path / room.__name__
        folder.mkdir()
        monkeypatch.setattr(room, "__path__", [*room.__path__, str(folder)])

    def write(name: str, text: str, room=methods) -> None:
        (tmp_path / room.__name__ / f"{name}.py").write_text(text)
        made.append((room, name))

    yield write
    for room, name in made:
        sys.modules.pop(f"{room.__name__}.{name}", None)
        vars(room).pop(name, None)


def test_imported_methods_do_not_count(written):
    written("own_one", IMPORTED + "class Own(MAE):\n    title = 'Own'\nclass _Part(Method): pass\n")
    assert "own_one" in method_names()
    found = find_method("own_one")
    assert (found.__name__, found.title) == ("Own", "Own")
    said = (found.Config, found.defaults, found.title, found.explained)
    assert find_options("own_one") == said
    assert find_method("mae").__name__ == "MAE"


def test_a_file_with_an_underscore_is_no_method(written):
    written("_shared", IMPORTED + "class Own(MAE): pass\n")
    assert "_shared" not in method_names()
    with pytest.raises(
        UserError, match=r"method is '_shared'; it must be one of dino, dinov2, distill"
    ):
        find_method("_shared")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none_here", IMPORTED, "it defines 0 (none)"),
        ("both_here", IMPORTED + "class A(MAE): pass\nclass B(Method): pass\n",
         "it defines 2 (A, B)"),
    ],
)  # fmt: skip
def test_a_file_without_one_method(written, name, text, said):
    written(name, text)
    with pytest.raises(UserError) as refusal:
        find_method(name)
    expected = f"methods/{name}.py must define one subclass of Method; {said}"
    assert str(refusal.value) == expected


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("broken_import", "import no_such_module_here", "cannot be imported: ModuleNotFoundError"),
        (
            "no_options",
            IMPORTED + "class A(Method):\n    title = 'A'\n",
            "A must define its Config",
        ),
        ("no_loss", IMPORTED + "class A(MAE):\n    explained = {}\n", "loss among them"),
    ],
)
def test_a_file_that_is_no_whole_method_is_refused_in_a_line(written, name, text, said):
    written(name, text)
    with pytest.raises(UserError) as refusal:
        find_method(name)
    assert str(refusal.value).startswith(f"methods/{name}.py")
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_packages_own_methods_say_their_options_apart():
    """So that their help needs no torch; a method of one's own need not. Nothing else is there."""
    own = {"dino", "dinov2", "distill", "ibot", "ijepa", "lejepa", "mae", "mae_dino", "simmim"}
    apart = {m.name for m in pkgutil.iter_modules(options.__path__)} - {"base"}
    assert own <= apart <= set(method_names())


APART = (
    "from dataclasses import dataclass\nfrom ssl_vit.options.base import MethodConfig\n"
    "@dataclass(frozen=True)\nclass A(MethodConfig):\n    ratio: float = 0.5\n"
)
SAID = "DEFAULTS = {}\nTITLE = 'Own'\nEXPLAINED = {}\n"


def test_options_are_found_apart(written):
    """The method's own file is not even read."""
    written("own_apart", "raise RuntimeError")
    written("own_apart", APART + SAID, options)
    config, *said = find_options("own_apart")
    assert (config.__name__, said) == ("A", [{}, "Own", {}])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("opt_import", "import no_such_module_here", "cannot be imported: ModuleNotFoundError"),
        ("opt_syntax", "class", "cannot be imported: SyntaxError"),
        ("opt_none", SAID, "must define one frozen dataclass on MethodConfig; it defines 0 (none)"),
        ("opt_both", APART + APART.replace("class A", "class B") + SAID, "it defines 2 (A, B)"),
        ("opt_silent", APART, "lacks DEFAULTS, TITLE, EXPLAINED; beside the options it must say"),
        ("opt_title", APART + "DEFAULTS = {}\nEXPLAINED = {}\n", "lacks TITLE; beside"),
    ],
)
def test_options_that_are_not_whole_are_refused_in_a_line(written, name, text, said):
    written(name, IMPORTED + "class A(MAE): pass\n")
    written(name, text, options)
    with pytest.raises(UserError) as refusal:
        find_options(name)
    assert str(refusal.value).startswith(f"options/{name}.py ")
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("recipe", "method"),
    [("mae_vit_b16", "mae"), ("mae_dino_digits", "mae_dino"), ("dinov2_v3_vit_l16", "dinov2"),
     ("maelstrom", ""), ("finetune_vit_b16", "")],
)  # fmt: skip
def test_a_recipe_is_of_the_method_that_its_name_begins_with(recipe, method):
    assert method_of(recipe) == method
