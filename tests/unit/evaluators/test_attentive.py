"""The attentive probe: pooling against loops, the honest choice, kept and recomputed tokens."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.sources import Source, open_source
from ssl_vit.data.view import View
from ssl_vit.evaluators import attentive
from ssl_vit.evaluators.attentive import (
    AttentiveProtocol,
    attentive_probe,
    choose_rate,
    fit_attentive_heads,
    grid_quality,
)
from ssl_vit.evaluators.attentive_head import AttentiveHead, heads_for
from ssl_vit.evaluators.attentive_picture import query_picture
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.selection import NOT_CHOSEN
from ssl_vit.evaluators.token_sets import TokenReader, TokenSet, read_tokens, token_reader
from ssl_vit.model.encoder import Encoder
from tests.unit.feature_sets import feature_set, normal, tagged

QUICK = AttentiveProtocol(epochs=1, least_steps=40, batch_size=32, learning_rates=(1e-3, 1e-2))
MACHINE = Machine(torch.device("cpu"), torch.float32, 0, at_once=16)


def randomised(head: AttentiveHead, seed: int = 0) -> AttentiveHead:
    """A head with nothing at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for p in head.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator)
    return head


def loop_pool(head: AttentiveHead, image: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Multi-head cross-attention of one query to the tokens of one image, by its definition."""
    width = len(query)
    e = width // head.heads
    answer = []
    for h in range(head.heads):
        part = slice(h * e, (h + 1) * e)
        scores = []
        for token in image:
            key = head.key[part] @ token
            scores.append((query[part] @ key).item() / math.sqrt(e))
        weights = [math.exp(s - max(scores)) for s in scores]
        values = [head.value[part] @ token for token in image]
        answer.append(
            sum(w / sum(weights) * v for w, v in zip(weights, values, strict=True)),
        )
    return torch.cat(answer)


@pytest.mark.parametrize("per_class", [False, True])
def test_pooling_is_cross_attention(per_class):
    head, tokens = randomised(AttentiveHead(12, 3, 2, 1, per_class, 0)), normal(4, 5, 12)
    pooled, logits = head.pool(tokens), head(tokens)
    for b, image in enumerate(tokens):
        answers = [loop_pool(head, image, query) for query in head.query]
        torch.testing.assert_close(pooled[b], torch.stack(answers))
        for c in range(3):
            wanted = answers[c if per_class else 0] @ head.weight[c] + head.bias[c]
            torch.testing.assert_close(logits[b, c], wanted)


@pytest.mark.parametrize("heads", [1, 3])
def test_identity_values_and_a_query_of_zeros_are_mean_pooling(heads):
    """Every head begins so, whatever its keys; one head or several."""
    head, tokens = AttentiveHead(12, 3, heads, 1, False, 5), normal(4, 7, 12)
    torch.testing.assert_close(head.pool(tokens)[:, 0], tokens.mean(1))
    head.query.data = normal(1, 12)
    assert (head.pool(tokens)[:, 0] - tokens.mean(1)).abs().max() > 1e-3


def test_more_depth_is_self_attention_before_it():
    head, tokens = AttentiveHead(12, 3, 2, 2, False, 0), normal(4, 5, 12)
    assert len(head.blocks) == 1
    torch.testing.assert_close(head.pool(tokens)[:, 0], head.blocks[0](tokens).mean(1))


def test_heads_are_64_wide():
    assert [heads_for(width) for width in (64, 192, 384, 768, 100)] == [1, 3, 6, 12, 1]


class Numbers(Source):
    """A source that gives class numbers, and no images: tokens are kept."""

    def __init__(self, labels: torch.Tensor) -> None:
        self.spec, self.labels = "numbers", labels.numpy()

    def __len__(self) -> int:
        return len(self.labels)


def token_set(n: int, classes: int, noise: float, seed: int, loud: int = 1) -> TokenSet:
    """Images of which ``loud`` of six tokens tells the class, behind a mark; all others are noise,
    so that the mean says little."""
    labels = torch.arange(n) % classes
    centres = normal(classes, 8, seed=1000)
    tokens = noise * normal(n, 6, 16, seed=seed)
    places = torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(seed))
    tokens[torch.arange(n), places, :8] = 2 * centres[labels]
    tokens[torch.arange(n), places, 8:] = 3.0
    return kept(tokens, labels)


def kept(tokens: torch.Tensor, labels: torch.Tensor) -> TokenSet:
    flat = tokens.half().double().flatten(0, 1)
    reader = token_reader(backbone(width=16), MACHINE)
    mean, std = flat.mean(0).float(), flat.std(0, correction=0).float()
    rows = feature_set(labels)
    return TokenSet(Numbers(labels), reader, rows, tokens.half(), mean, std, tokens.shape[1])


def backbone(**options) -> Backbone:
    usual = {"image_size": (8,), "patch_size": 4, "width": 32, "depth": 2, "heads": 2}
    config = EncoderConfig(**{"arch": "vit_tiny_patch16_224"} | usual | options)
    torch.manual_seed(0)
    encoder = Encoder(config, 3).eval()
    view = View(encoder.image_size, 3, (0.5,) * 3, (0.25,) * 3)
    return Backbone("tiny", encoder, view, ("cls", "mean"), {}, Path())


def test_attention_finds_what_the_mean_hides():
    """One token of six tells the class: the probe finds it, its first mean pooling does not."""
    train, other = token_set(240, 4, 1.0, 0), token_set(200, 4, 1.0, 1)
    other = replace(other, mean=train.mean, std=train.std)
    protocol = replace(QUICK, least_steps=300)
    head = fit_attentive_heads(train, torch.arange(240), [1e-2], protocol)[1e-2]
    found = grid_quality({1e-2: head}, other, torch.arange(200))[1e-2]
    head.query.data.zero_()
    assert found > 95 > grid_quality({1e-2: head}, other, torch.arange(200))[1e-2] + 10


def test_heads_side_by_side_are_heads_one_by_one():
    train = token_set(64, 4, 1.0, 0)
    rows = torch.arange(64)
    both = fit_attentive_heads(train, rows, [1e-3, 1e-2], QUICK)
    alone = fit_attentive_heads(train, rows, [1e-2], QUICK)[1e-2]
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(both[1e-2].state_dict()[name], value, atol=1e-5, rtol=1e-4)
    again = fit_attentive_heads(train, rows, [1e-2], QUICK)[1e-2]
    assert all(
        torch.equal(a, b) for a, b in zip(alone.parameters(), again.parameters(), strict=True)
    )


def test_a_head_that_diverges_is_not_chosen():
    train = token_set(80, 4, 1.0, 0)
    rate, found = choose_rate(train, replace(QUICK, learning_rates=(1e-2, 1e30)), None)
    assert rate == 1e-2
    assert found[1e30] == -1 or found[1e30] < found[1e-2]


def test_the_choice_is_on_held_out_images_and_whole_groups(monkeypatch):
    train, groups = token_set(80, 4, 1.0, 0), torch.arange(80) // 5
    train = replace(train, rows=replace(train.rows, groups=groups))
    seen = {}

    def watched(name: str, place: int):
        real = getattr(attentive, name)

        def call(*given):
            seen[name] = given[place]
            return real(*given)

        monkeypatch.setattr(attentive, name, call)

    watched("fit_attentive_heads", 1)
    watched("grid_quality", 2)
    rate, found = choose_rate(train, QUICK, None)
    assert rate in QUICK.learning_rates
    assert list(found) == sorted(QUICK.learning_rates)
    kept_rows, judged = seen["fit_attentive_heads"], seen["grid_quality"]
    assert sorted([*kept_rows.tolist(), *judged.tolist()]) == list(range(80))
    assert not set(groups[kept_rows].tolist()) & set(groups[judged].tolist())
    few = kept(normal(6, 6, 16), torch.arange(6) % 2)
    assert choose_rate(few, QUICK, None) == (None, {})


def test_several_labels_an_image():
    made = tagged(120, 3, 0)
    tokens = normal(120, 6, 16)
    tokens[:, :, :12] = 0.2 * tokens[:, :, :12] + made.parts["mean"][:, None]
    train = kept(tokens, made.labels.nan_to_num(0))
    train = replace(train, rows=replace(train.rows, labels=made.labels))
    rate, found = choose_rate(train, replace(QUICK, least_steps=150), None)
    assert rate is not None
    assert found[rate] > 75


# --- images ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 20 pictures: a bright square somewhere, on noise, or none; one is broken."""
    root = tmp_path_factory.mktemp("squares")
    random = np.random.RandomState(0)
    for i in range(40):
        picture = random.randint(0, 120, (8, 8, 3)).astype(np.uint8)
        if i % 2:
            r, c = random.randint(0, 2, 2) * 4
            picture[r : r + 4, c : c + 4] = 250
        place = root / ("with" if i % 2 else "without")
        place.mkdir(exist_ok=True)
        Image.fromarray(picture).save(place / f"{i:02d}.png")
    (root / "with" / "99.png").write_bytes(b"no image")
    return root


def opened(folder: Path) -> Source:
    return open_source(f"folder:{folder}", ReadConfig(), 3)


def test_tokens_kept_and_recomputed_are_the_same(folder):
    reader = token_reader(backbone(), MACHINE)
    one, two = (read_tokens(reader, opened(folder), gb) for gb in (1.0, 0.0))
    assert one.kept is not None
    assert two.kept is None
    assert (len(one.rows.labels), one.rows.unreadable, one.places) == (40, 1, 4)
    rows = torch.tensor([39, 0, 7, 12, 3])
    for (a, i), (b, j) in zip(one.batches(rows, 2), two.batches(rows, 2), strict=True):
        assert torch.equal(i, j)
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
    every = torch.cat([tokens for tokens, _ in one.batches(torch.arange(40), 16)]).flatten(0, 1)
    torch.testing.assert_close(every.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(every.std(0), torch.ones(32), atol=1e-2, rtol=0)


@pytest.mark.parametrize("per_class", [False, True])
def test_the_picture_is_of_the_query_that_is_asked(tmp_path, per_class):
    """One query looks at the reddest patch; of several that of the class found, at the bluest."""
    corners = {"red": (0, 8), "blue": (8, 0)}
    pixels = np.zeros((16, 16, 3), np.uint8)
    for channel, (y, x) in zip((0, 2), corners.values(), strict=True):
        pixels[y : y + 8, x : x + 8, channel] = 200
    for i in range(3):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "a" / f"{i}.png")
    view = View((16, 16), 3, (0.0,) * 3, (1.0,) * 3)
    means = torch.nn.AvgPool2d(8)
    reader = TokenReader(lambda images: [means(images)], 3, view, MACHINE)
    source = opened(tmp_path)
    tokens = read_tokens(reader, source, 1.0)
    plain = replace(tokens, mean=torch.zeros(3), std=torch.ones(3))
    head = AttentiveHead(3, 2, 1, 1, per_class, 0)
    head.key.data = torch.eye(3)
    head.query.data = torch.tensor([[20.0, 0, 0], [0, 0, 20]])[: len(head.query)]
    head.bias.data = torch.tensor([0.0, 100.0])
    sheet = query_picture(head, plain, source, torch.tensor([0, 2]))
    assert sheet.shape[1] == 5 * 100 + 4  # an image, three overlays and one head
    for row in range(2):
        image, seen = (sheet[16 + 100 * row :, 4 + 100 * x :][:96:6, :96:6] for x in (0, 4))
        assert (image == pixels).all()
        y, x = corners["blue" if per_class else "red"]
        assert tuple(seen[y + 4, x + 4]) == (255, 248, 197)
        assert tuple(seen[12 - y, 12 - x]) == (6, 7, 12)


def test_the_probe_predicts_every_readable_image(folder):
    source = opened(folder)
    tokens = read_tokens(token_reader(backbone(), MACHINE), source, 1.0)
    found, rows, _ = attentive_probe(tokens, source, replace(QUICK, queries="class"))
    assert found.guesses.shape == (40, 2)
    assert len(rows.index) == 40
    assert float((found.guesses[:, 0] == rows.labels).double().mean()) > 0.9
    assert found.details["heads"] == 1
    assert "not [CLS]" in found.details["attends"]
    tiny = read_tokens(token_reader(backbone(), MACHINE), opened(folder), 1.0)
    rows_of_8 = tiny.rows.take(torch.arange(16, 24))
    few, *_ = attentive_probe(replace(tiny, rows=rows_of_8, kept=tiny.kept[16:24]), source, QUICK)
    assert few.details["selection"] == NOT_CHOSEN


def test_other_networks_give_the_places_of_their_last_map():
    network = timm.create_model("resnet18", num_classes=0).eval()
    view = View((64, 64), 3, (0.5,) * 3, (0.25,) * 3)
    reader = token_reader(Backbone("r", network, view, ("pooled",), {}, Path()), MACHINE)
    with torch.no_grad():
        tokens = reader.maps(normal(2, 3, 64, 64))[-1].flatten(2).mT
    assert tokens.shape == (2, 4, reader.width)
    torch.testing.assert_close(tokens.mean(1), network(normal(2, 3, 64, 64)), atol=1e-4, rtol=1e-3)


def test_encoders_without_cls_have_all_their_tokens():
    reader = token_reader(backbone(arch="vit_base_patch16_siglip_224"), MACHINE)
    assert reader.map(normal(2, 3, 8, 8)).shape == (2, 32, 2, 2)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="--heads is 5; it must divide the tokens' width, 32"):
        AttentiveProtocol(heads=5).head_count(32)
