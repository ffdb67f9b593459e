"""Images and labels as people have them: what is taken is said before the first step."""

import io
import tarfile

import numpy as np
from PIL import Image


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def test_every_image_of_a_shard_whose_names_have_dots_is_trained_on(door):
    """Labels by sample are those of all its images; what is not measured with them is said."""
    with tarfile.open(door.folder / "t.tar", "w") as archive:
        for patient in range(12):
            members = {f"p{patient}.slice{k:03d}.png": png(20 * patient + k) for k in range(20)}
            members[f"p{patient}.json"] = b'{"label": "%s"}' % (b"ill" if patient % 3 else b"well")
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    result = door.pretrain("--run.out", "run", "--data.train", "tar:t.tar", "--run.length", "3st")
    assert result.returncode == 0, result.stderr
    assert "240 train, none held out" in result.stdout
    plan = " ".join(result.stdout.replace("│", " ").split())
    assert "labels 2 classes, from 'label' in .json of the shards" in plan
    assert "names have dots of their own (240 images, 12 different names" in result.stderr
    assert "k-NN not measured while training: no image is held out" in plan


def test_a_pattern_without_quotes_is_told_in_one_line(door):
    for i in range(3):
        tarfile.open(door.folder / f"t-{i}.tar", "w").close()
    shards = [f"tar:t-{i}.tar" for i in range(3)]
    for given in (["--data.train", *shards], [f"--data.train={shard}" for shard in shards]):
        result = door.pretrain("--run.out", "run", *given)
        assert result.returncode == 2
        assert result.stderr.startswith("error: --data.train has 3 values, as the shell spreads")
        assert result.stderr.endswith("--data.train 'tar:t-{0..2}.tar'\n")
        assert result.stderr.count("\n") == 1
