"""The glossary: general numbers, and those of each method by the methods themselves."""

import pytest

from ssl_vit.common.scalars import Scalar
from ssl_vit.methods import method_names
from ssl_vit.methods.base import find_method
from ssl_vit.reporting import explained
from ssl_vit.reporting.explained import Glossary, method_scalars, method_title


def test_a_methods_own_words_are_used():
    mae, dino = Glossary(["mae"]), Glossary(["dino"])
    for glossary, name in ((mae, "mae"), (dino, "dino")):
        for key, scalar in find_method(name).explained.items():
            assert glossary.title(key) == scalar.title
            assert glossary.meaning(key) == scalar.meaning
    assert mae.meaning("kl") == ""
    assert mae.meaning("loss") != dino.meaning("loss")
    for glossary in (mae, dino, Glossary([])):
        assert glossary.title("knn") == "k-NN accuracy, %"
        assert glossary.title("lr") == "Learning rate"
    assert Glossary([]).title("loss") == "Loss"


def test_what_nobody_explains_has_its_own_name():
    glossary = Glossary(["mae", "a method of another place", ""])
    assert (glossary.title("strange_number"), glossary.meaning("strange_number")) == (
        "strange number",
        "",
    )
    assert method_title("a method of another place") == "a method of another place"
    assert method_scalars("a method of another place") == {}
    assert method_title("dino") == "DINO"


def test_methods_of_one_name_are_joined():
    """Both meanings once each, however many runs of each there are."""
    both, meanings = (
        Glossary(["mae", "dino", "mae"]).meaning("loss"),
        [Glossary([name]).meaning("loss") for name in ("mae", "dino")],
    )
    assert both == " / ".join(meanings)
    assert Glossary(["dino", "dino"]).meaning("loss") == meanings[1]


def test_order():
    """General ones, the method's own, the rest of the general ones; unknown ones last as given."""
    names = ["z", "lr", "kl", "a", "rankme", "loss", "teacher_entropy"]
    expected = ["loss", "rankme", "teacher_entropy", "kl", "lr", "z", "a"]
    assert Glossary(["dino"]).ordered(names) == expected
    assert Glossary(["mae"]).ordered(["kl", "lr", "loss"]) == ["loss", "lr", "kl"]


@pytest.mark.parametrize("name", method_names())
def test_every_method_explains_itself(name):
    """A title, the loss, and what its progress line shows; in whole sentences."""
    kind = find_method(name)
    assert kind.title
    assert {"loss", *kind.progress} <= kind.explained.keys()
    for scalar in kind.explained.values():
        assert isinstance(scalar, Scalar)
        assert scalar.title
        assert scalar.meaning.endswith(".")


def test_a_method_may_have_the_name_of_a_general_number(monkeypatch):
    own = {"loss": Scalar("Loss", "Mine."), "rankme": Scalar("My rank", "Mine, too.")}
    monkeypatch.setattr(explained, "method_scalars", lambda name: own)
    glossary = Glossary(["mine"])
    assert glossary.title("rankme") == "My rank"
    assert glossary.ordered(["rankme", "loss"]) == ["loss", "rankme"]
