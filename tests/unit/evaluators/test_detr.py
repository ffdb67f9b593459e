"""DETR: losses and matching against loops, transformers' own decoder, what is learned and found."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.seeds import generator
from ssl_vit.common.task import Views
from ssl_vit.data.coco_images import JitteredObjects, WholeImages
from ssl_vit.data.jitter import Jitter
from ssl_vit.data.sources import open_source
from ssl_vit.evaluators.detect import Detect, Detections, detect_batch
from ssl_vit.evaluators.detect_options import DetectOptions
from ssl_vit.evaluators.detect_scores import score_detections
from ssl_vit.evaluators.detr import LAYERS, Detr, Guess, matched, seen_tokens, set_losses
from ssl_vit.evaluators.start import Start
from ssl_vit.evaluators.tuned_detector import detector_of
from ssl_vit.model.encoder import Encoder
from tests.unit.coco_files import coco_at

TINY = EncoderConfig(
    arch="vit_tiny_patch16_224", image_size=(32,), patch_size=8, width=32, depth=2, heads=2
)
FRAME, QUERIES, CLASSES = (48, 64), 6, 2
STEPS = 80  # that four images are learned in


def detr(**options) -> Detr:
    torch.manual_seed(1)
    module = Encoder(TINY, 3).eval()
    start = Start(module, True, (32, 32), 3, (0.5,) * 3, (0.2,) * 3, {"given": "made here"})
    given = {"width": 32, "queries": QUERIES, "drop_path": 0.0} | options
    made = DetectOptions(image_size=FRAME, head="detr", **given)
    network = detector_of(start, made, CLASSES, False, 0)
    assert isinstance(network, Detr)
    return network


@pytest.fixture(scope="module")
def network() -> Detr:
    return detr()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(coco_at(tmp_path_factory.mktemp("coco"), count=4))


def batch_of(source, rows) -> Views:
    """Views of images, some of them smaller than the frame, normalised in the simplest way."""
    images = JitteredObjects(source, Jitter(FRAME, (0.5, 1.2), 0.5), 3, 0, masks=False)
    views = images.__getitems__([(0, row) for row in rows]).views
    views.crops[0] = views.crops[0].float() / 255 - 0.5
    return views


def drawn(queries, counts, classes=3, layers=1, seed=0):
    """Random predictions of some layers, and random objects, in float64."""
    rng = generator(seed)
    guesses, targets = [], []
    for _ in range(layers):
        logits = torch.tensor(rng.normal(size=(len(counts), queries, classes + 1)))
        boxes = torch.tensor(rng.uniform(0.1, 0.6, (len(counts), queries, 4)))
        guesses.append(Guess(logits.requires_grad_(), boxes.requires_grad_()))
    for count in counts:
        labels = torch.tensor(rng.integers(1, classes + 1, count))
        boxes = torch.tensor(rng.uniform(0.1, 0.6, (count, 4)))
        targets.append({"class_labels": labels, "boxes": boxes})
    return guesses, targets


def corners(box):
    x, y, w, h = box.tolist()
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def giou(one, two):
    """Generalized IoU of two boxes, by its definition."""
    a, b = corners(one), corners(two)
    area = lambda c: max(0.0, c[2] - c[0]) * max(0.0, c[3] - c[1])  # noqa: E731
    low, high = [map(f, zip(a, b, strict=True)) for f in (min, max)]
    (l0, t0, r0, b0), (l1, t1, r1, b1) = low, high
    both, hull = area((l1, t1, r0, b0)), area((l0, t0, r1, b1))
    union = area(a) + area(b) - both
    return both / union - (hull - union) / hull


def cost(guess, target, image, query, thing):
    """Cost of matching a query with an object."""
    probability = float(guess.logits[image, query].softmax(0)[target["class_labels"][thing]])
    box, wanted = guess.boxes[image, query], target["boxes"][thing]
    return 5 * float((box - wanted).abs().sum()) - probability - 2 * giou(box, wanted)


def cheapest(guess, target, image):
    """Cheapest matching of an image's queries and objects of all that there are."""
    queries, objects = guess.logits.shape[1], len(target["boxes"])
    few = min(queries, objects)
    pairings = [
        tuple(zip(q, o, strict=True))
        for q in itertools.permutations(range(queries), few)
        for o in itertools.combinations(range(objects), few)
    ]
    total = lambda pairs: sum(cost(guess, target, image, q, o) for q, o in pairs)  # noqa: E731
    return min(pairings, key=total)


def losses_by_loops(guesses, targets):
    """Losses query by query and box by box, with the matching of all permutations."""
    found = []
    objects = sum(len(t["boxes"]) for t in targets)
    for guess in guesses:
        sums, weights = {"class": 0.0, "box": 0.0, "giou": 0.0}, 0.0
        for image, target in enumerate(targets):
            pairs = dict(cheapest(guess, target, image))
            for query in range(guess.logits.shape[1]):
                thing = pairs.get(query)
                label = 0 if thing is None else int(target["class_labels"][thing])
                weight = 0.1 if label == 0 else 1.0
                weights += weight
                odds = [math.exp(v) for v in guess.logits[image, query].tolist()]
                sums["class"] -= weight * math.log(odds[label] / sum(odds))
                if thing is not None:
                    box, wanted = guess.boxes[image, query], target["boxes"][thing]
                    sums["box"] += 5 * float((box - wanted).abs().sum())
                    sums["giou"] += 2 * (1 - giou(box, wanted))
        shares = {"class": weights, "box": objects, "giou": objects}
        found.append({name: value / shares[name] for name, value in sums.items()})
    return found[-1] | {"auxiliary": sum(sum(one.values()) for one in found[:-1])}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("queries", "counts"), [(5, (2, 3)), (5, (4, 0, 1)), (3, (5, 2))])
def test_losses_are_those_of_loops(network, queries, counts, seed):
    """Also of images without objects, and with more objects than queries."""
    guesses, targets = drawn(queries, counts, layers=2, seed=seed)
    found = set_losses(guesses, targets, network.matcher)
    expected = losses_by_loops(guesses, targets)
    assert list(found) == ["class", "box", "giou", "auxiliary"]
    for name, value in found.items():
        assert float(value.detach()) == pytest.approx(expected[name], rel=1e-6), name


def test_the_matching_is_the_cheapest_of_all(network):
    (guess,), targets = drawn(5, (3, 4), seed=4)
    pairs = matched(guess, targets, network.matcher)
    for image, (queries, objects) in enumerate(pairs):
        found = sorted(zip(queries.tolist(), objects.tolist(), strict=True))
        assert found == sorted(cheapest(guess, targets[image], image))


def test_the_order_of_annotations_does_not_matter(network):
    guesses, targets = drawn(6, (4, 3), layers=2)
    turned = [{name: value.flip(0) for name, value in target.items()} for target in targets]
    first, second = (set_losses(guesses, given, network.matcher) for given in (targets, turned))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, msg=name)


def test_images_without_objects_teach_that_there_is_none(network):
    guesses, targets = drawn(4, (0, 0), layers=2)
    found = set_losses(guesses, targets, network.matcher)
    expected = F.cross_entropy(guesses[-1].logits.flatten(0, 1), torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(found["class"], expected)
    assert found["box"] == found["giou"] == 0
    sum(found.values()).backward()
    assert not guesses[0].boxes.grad.any()


def test_predictions_that_are_no_numbers_are_left_to_the_loop(network):
    """Which skips the step, for all processes; the matcher alone would stop one of them."""
    guesses, targets = drawn(4, (2, 1))
    broken = [Guess(guess.logits, guess.boxes * math.nan) for guess in guesses]
    assert set_losses(broken, targets, network.matcher)["box"].isnan()
    broken = [Guess(guess.logits * math.nan, guess.boxes) for guess in guesses]
    assert set_losses(broken, targets, network.matcher)["class"].isnan()


def test_the_decoder_is_that_of_transformers():
    """Its own decoder, given these layers, and positions of tokens by the formula; the norm is of
    predictions alone, and changes nothing between layers."""
    from transformers.models.detr.modeling_detr import DetrDecoder

    network = detr()
    torch.nn.init.uniform_(network.norm.weight, 0.2, 3.0)
    layer = network.layers[0]
    whole = DetrDecoder(layer.self_attn.config).eval()
    whole.layers.load_state_dict(network.layers.state_dict())
    whole.layernorm.load_state_dict(network.norm.state_dict())
    images, missing = torch.randn(2, 3, *FRAME), torch.zeros(2, 3, *FRAME, dtype=torch.bool)
    missing[0, :, 16:] = True
    found = network.eval()(images, missing)
    tokens = network.project(network.backbone(images)[-1].flatten(2).transpose(1, 2))
    queries = network.queries.expand(2, -1, -1)
    seen = torch.ones(2, 48)
    seen[0, 16:] = 0
    last = whole(
        inputs_embeds=torch.zeros_like(queries),
        encoder_hidden_states=tokens,
        encoder_attention_mask=seen,
        spatial_position_embeddings=sines(6, 8, 32).expand(2, -1, -1),
        object_queries_position_embeddings=queries,
    ).last_hidden_state
    torch.testing.assert_close(found[-1].logits, network.classify(last), rtol=1e-4, atol=1e-5)
    assert len(found) == LAYERS
    assert found[-1].boxes.shape == (2, QUERIES, 4)


def sines(rows, columns, width):
    """Positions: sines and cosines of the row, then of the column, each as a share of 2 pi."""
    made = torch.zeros(1, rows * columns, width)
    half = width // 2
    for row, column in itertools.product(range(rows), range(columns)):
        for first, place in ((0, (row + 1) / rows), (half, (column + 1) / columns)):
            for n in range(half):
                angle = 2 * math.pi * place / 10000 ** (2 * (n // 2) / half)
                wave = math.cos(angle) if n % 2 else math.sin(angle)
                made[0, row * columns + column, first + n] = wave
    return made


def test_tokens_without_a_pixel_are_not_attended_to(network):
    """Whatever they hold; a token of which some pixels are there is."""
    images, missing = torch.randn(2, 3, *FRAME), torch.zeros(2, 3, *FRAME, dtype=torch.bool)
    missing[0, :, 20:], missing[0, :, :, 41:] = True, True
    missing[1, 0] = True  # the other channels are there
    seen = seen_tokens(missing, (6, 8)).unflatten(1, (6, 8))
    assert seen[0, :3, :6].all()
    assert seen[0].sum() == 18
    assert seen[1].all()
    assert seen_tokens(torch.ones_like(missing), (6, 8)).all()

    def outcome(row, column):
        def change(module, inputs, out):
            out = out.clone()
            out[0, 8 * row + column] += 10
            return out

        hook = network.project.register_forward_hook(change)
        with hook, torch.no_grad():
            return network(images, missing)[-1].boxes

    network.eval()
    with torch.no_grad():
        same = network(images, missing)[-1].boxes
    assert torch.equal(outcome(3, 0), same)
    assert torch.equal(outcome(0, 6), same)
    assert not torch.allclose(outcome(2, 5), same)


@pytest.mark.parametrize("frozen", [False, True])
def test_all_that_is_trained_gets_a_gradient(source, frozen):
    """The patch embedding, too, unless it is frozen; the losses are those of the whole."""
    task = Detect(detr(frozen=frozen), 0.5).train()
    found = task(batch_of(source, [0, 1]), 0)
    total = sum(value for name, value in found.items() if name != "loss")
    torch.testing.assert_close(found["loss"], total)
    found["loss"].backward()
    body = "network.backbone.body.network.vit."
    grads = {n: p.grad for n, p in task.named_parameters() if task.trains(n, p)}
    assert all(grad is not None for grad in grads.values())
    assert (f"{body}patch_embed.proj.weight" in grads) == (not frozen)
    if not frozen:
        assert grads[f"{body}patch_embed.proj.weight"].abs().max() > 0
    assert task.lr_scale("network.queries") == 1
    assert frozen or task.lr_scale(f"{body}blocks.1.mlp.fc1.weight") == 0.5


def test_new_weights_are_a_function_of_the_seed(network):
    other = detr()
    assert not torch.equal(torch.rand(3), torch.rand(3))  # elsewhere chance goes on
    for name, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_detections_are_the_likeliest_classes_of_the_best_queries():
    """In pixels of the image, within it, and as many as are asked for."""
    network = detr(detections=4).eval()
    images = torch.randn(1, 3, *FRAME)
    drawn = {"scaled": torch.tensor([[24, 64]]), "original": torch.tensor([[48, 128]])}
    views = Views([images], torch.tensor([5]), torch.tensor([-1]), drawn=drawn)
    with torch.no_grad():
        guess = network(images)[-1]
        (found,) = detect_batch(network, views)
    odds = guess.logits[0].softmax(1)
    ranked = sorted(range(QUERIES), key=lambda q: -float(odds[q, 1:].max()))[:4]
    assert found.index == 5
    assert found.classes.tolist() == [int(odds[q, 1:].argmax()) for q in ranked]
    torch.testing.assert_close(found.scores, torch.stack([odds[q, 1:].max() for q in ranked]))
    for box, query in zip(found.boxes, ranked, strict=True):
        left, top, right, bottom = corners(guess.boxes[0, query])
        sides = [min(max(128 * x, 0), 128) for x in (left, right)]
        heights = [min(max(96 * y, 0), 48) for y in (top, bottom)]
        expected = torch.tensor([sides[0], heights[0], sides[1], heights[1]])
        torch.testing.assert_close(box, expected, rtol=1e-4, atol=1e-3)


def test_a_few_images_are_learned(source):
    """The loss falls, and what is found is right, on four images seen again and again."""
    torch.manual_seed(0)
    task = Detect(detr(), 1.0).train()
    optimizer = torch.optim.AdamW(task.parameters(), 1e-3, weight_decay=0.0)
    images = JitteredObjects(source, Jitter(FRAME, (1.0, 1.0), 0.0), 3, 0, masks=False)
    views = images.__getitems__([(0, row) for row in range(4)]).views
    views.crops[0] = views.crops[0].float() / 255 - 0.5
    before, losses = ap50(task, source), []
    for step in range(STEPS):
        loss = task(views, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    after = ap50(task, source)
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}, AP50 {before:.1f} to {after:.1f}")
    assert losses[-1] < 0.4 * losses[0]
    assert after > before + 30


def ap50(task, source) -> float:
    """AP50 of the boxes of all images of a source."""
    views = WholeImages(source, FRAME, 3).__getitems__(range(len(source))).views
    views.crops[0] = views.crops[0].float() / 255 - 0.5
    task.eval()
    with torch.no_grad():
        found = detect_batch(task.network, views)
    task.train()
    return score_detections(Detections(found, 0), source, "boxes", "here", 0).metrics["ap50"]
