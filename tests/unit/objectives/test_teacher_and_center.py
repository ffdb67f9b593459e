"""Teacher and centre against their closed forms: when they move, by what, and when they do not."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ssl_vit.common.config import EncoderConfig
from ssl_vit.model.encoder import Encoder
from ssl_vit.objectives.centering import Center
from ssl_vit.objectives.ema import Teacher

SMALL = EncoderConfig(
    "vit_tiny_patch16_224", image_size=(8,), patch_size=4, width=24, depth=1, heads=2
)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Encoder(replace(SMALL, drop_path=0.3)), nn.Linear(24, 5)


def moved(student) -> None:
    """The student after a step."""
    with torch.no_grad():
        for part in student:
            for p in part.parameters():
                p.add_(torch.randn_like(p))


def test_a_teacher_begins_equal_and_is_its_own(student):
    teacher = Teacher(*student)
    assert teacher.encoder.config.drop_path == 0
    assert not any(p.requires_grad for p in teacher.parameters())
    for own, other in zip((teacher.encoder, teacher.head), student, strict=True):
        assert own is not other
        before = state(own)
        assert before.keys() == other.state_dict().keys()
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    kept = state(teacher)
    moved(student)
    assert all(torch.equal(v, kept[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("took", [True, False])
def test_a_teacher_follows_by_the_closed_form(student, took):
    """After n steps: m^n of the first weights and (1 - m) m^(n - k) of the student's k-th."""
    teacher, m = Teacher(*student), 0.9
    parts = {"encoder": student[0], "head": student[1]}
    expected = {name: value.double() for name, value in state(teacher).items()}
    for _ in range(4):
        moved(student)
        teacher.follow(*student, m, torch.tensor(took))
        for part, module in parts.items():
            for name, value in module.state_dict().items():
                if took:
                    own = expected[f"{part}.{name}"]
                    expected[f"{part}.{name}"] = m * own + (1 - m) * value.double()
    for name, value in teacher.state_dict().items():
        tolerance = 1e-6 if took else 0
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=tolerance)


def test_a_teacher_starts_from_given_weights(student):
    """Of the encoder; its head stays as it is."""
    teacher = Teacher(*student)
    head = state(teacher.head)
    moved(student)
    teacher.start_from(student[0])
    for name, value in student[0].state_dict().items():
        assert torch.equal(teacher.encoder.state_dict()[name], value)
    assert all(torch.equal(v, head[k]) for k, v in teacher.head.state_dict().items())


@pytest.mark.parametrize("parts", [1, 3])
def test_a_centre_moves_by_the_mean_of_all_parts(parts):
    """c <- m c + (1 - m) mean; what it takes off is the centre of before, in every part."""
    torch.manual_seed(0)
    center, expected = Center(7, 0.6).train(), torch.zeros(7)
    for _ in range(3):
        outputs = torch.randn(12, 7)
        for part in outputs.chunk(parts):
            torch.testing.assert_close(center(part), part - expected)
        center.update(torch.tensor(True))
        expected = 0.6 * expected + 0.4 * outputs.mean(0)
        torch.testing.assert_close(center.value, expected)
    assert list(center.state_dict()) == ["value"]


def test_a_centre_stays_where_the_step_was_skipped():
    """Even by what is not finite; and what was seen then is forgotten."""
    center = Center(3, 0.5).train()
    center.value.fill_(2.0)
    center(torch.full((4, 3), torch.nan))
    center.update(torch.tensor(False))
    assert center.value.tolist() == [2.0] * 3
    center(torch.full((4, 3), 4.0))
    center.update(torch.tensor(True))
    assert center.value.tolist() == [3.0] * 3


def test_outputs_of_several_calls_count_by_their_rows():
    center = Center(2, 0.5).train()
    center(torch.zeros(30, 2))
    center(torch.ones(10, 2))
    center.update(torch.tensor(True))
    assert center.value.tolist() == [0.125, 0.125]


def test_a_centre_that_has_seen_nothing_stays():
    center = Center(2, 0.5).train()
    center.update(torch.tensor(True))
    assert center.value.tolist() == [0.0, 0.0]


def test_a_teacher_of_an_encoder_alone(student):
    teacher = Teacher(student[0])
    before = state(teacher.encoder)
    moved(student)
    teacher.follow(student[0], None, 0.5, torch.tensor(True))
    own = state(teacher.encoder)
    for name, parameter in student[0].named_parameters():
        torch.testing.assert_close(own[name], (before[name] + parameter.detach()) / 2)


def test_a_centre_does_not_move_by_evaluation():
    center = Center(3, 0.5).train()
    center(torch.ones(2, 3))
    center.eval()
    assert torch.equal(center(torch.full((2, 3), 100.0)), torch.full((2, 3), 100.0))
    center.train()
    center.update(torch.tensor(True))
    assert center.value.tolist() == [0.5] * 3


def test_no_gradient_goes_through_a_centre():
    center = Center(3, 0.5).train()
    outputs = torch.ones(2, 3, requires_grad=True)
    center(outputs).sum().backward()
    assert not any(seen.requires_grad for seen in center._seen)  # it would keep the graph alive
    assert outputs.grad.tolist() == [[1.0] * 3] * 2
    center.update(torch.tensor(True))
    assert not center.value.requires_grad
