"""Masks of DINOv2 and DINOv3 against those recorded from their generators."""

import random

import pytest

from ssl_vit.data.order import Places
from ssl_vit.objectives.masks import BatchMasks, block_mask
from tests.parity.golden import check_there_are, golden_files, read_golden

PATTERN = "dinov[23]_masks.safetensors"
FILES = golden_files(PATTERN)


def test_there_are_golden_files():
    check_there_are(FILES, PATTERN)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def recorded(request):
    """The file's config and tensors, and whether its masks are filled up."""
    return *read_golden(request.param), request.param.stem.startswith("dinov3")


def test_blocks(recorded):
    """From Python's generator with the same seed: the same blocks, patch by patch."""
    config, golden, exact = recorded
    fewer = 0
    for seed in config["seeds"]:
        for patches in config["requests"]:
            expected = golden[f"seed{seed}.request{patches}"].bool()
            blocks = block_mask(tuple(config["grid"]), patches, random.Random(seed))
            fewer += int(blocks.sum()) < patches
            if blocks.sum() == patches or not exact:
                assert (blocks == expected.numpy()).all()
                continue
            filled = block_mask(tuple(config["grid"]), patches, random.Random(seed), exact)
            assert expected.sum() == filled.sum() == patches
            assert (filled >= blocks).all()
            assert (expected.numpy() >= blocks).all()
    assert fewer, "no case in which patches are missing"


def test_a_batch(recorded):
    """How many crops are masked, of which strata, and the most that may be hidden together."""
    config, golden, exact = recorded
    collate = config["collate"]
    masks = BatchMasks(
        tuple(config["grid"]),
        probability=collate["mask_probability"],
        ratio=tuple(collate["mask_ratio"]),
        exact=exact,
    )
    drawn = masks.draw(Places(key=5, batch=collate["batch"], start=0, count=collate["batch"]))
    ours, theirs = (
        sorted(m.sum(1).tolist()) for m in (drawn["masked"], golden["collate.masks"].int().numpy())
    )
    assert len(drawn["patches"]) == collate["upperbound"]
    assert ours.count(0) == theirs.count(0)
    if exact:
        assert ours == theirs
    low, high = collate["mask_ratio"]
    n, strata = drawn["masked"].shape[1], len(ours) - ours.count(0)
    for found in (ours, theirs):
        for i, hidden in enumerate(found[-strata:]):
            ends = [n * (low + (high - low) * (i + k) / strata) for k in (0, 1)]
            assert int(ends[0]) - 3 <= hidden <= ends[1] + 1e-6
    assert drawn["weights"].sum() == pytest.approx(strata)
