"""Run folders made by hand, for tests of what is read from them."""

import json

import numpy as np
from PIL import Image

CONFIG = """
method: {mask_ratio: 0.75}
run: {out: runs/x, length: 10ep, log_every: 10}
data: {train: 'folder:images', channels: 3}
encoder: {arch: vit_tiny_patch16_224, patch_size: 4, depth: 3}
optim: {batch_size: 32, lr: 0.001}
"""


def train_row(step, **values):
    return {"step": step, "loss": 1.0, "lr": 1e-3, "images_per_s": 100.0, "waiting": 0.0, **values}


def make_run(folder, rows, status=None, config=CONFIG):
    """A run's folder with these rows of metrics.jsonl; ``status`` updates a finished one's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config:
        (folder / "config.yaml").write_text(config)
    last = max((row["step"] for row in rows), default=0)
    known = {"state": "finished", "name": "mae", "command": "python -m ssl_vit.pretrain mae"}
    known |= {"step": last, "total": last, "images_per_step": 32, "steps_per_epoch": 50}
    known |= {"pooling": "mean", "device": "cpu", "threads": 2, "started": 1.0, "updated": 2.0}
    (folder / "status.json").write_text(json.dumps(known | (status or {})))
    return folder


def score(top1, low, high, features="mean", **more):
    """A score as result files have it."""
    top1 = None if top1 is None else float(top1)
    plain = {"features": features, "setting": "k=20", "metrics": {"top1": top1, "top5": 99.0}}
    plain |= {"interval": [float(low), float(high)], "per_class": {"a": 50.0, "b": 60.0}}
    return plain | {"confusion": [[3, 1], [0, 4]], "details": {}} | more


def write_results(folder, scores):
    """``results.json`` of these scores: by features, by evaluator."""
    (folder / "results.json").write_text(json.dumps({"evaluator": "pretrain", "scores": scores}))


def write_panel(folder, kind, step, value=90):
    path = folder / "panels" / kind / f"step-{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(path)
    return path


def write_projection(folder, step):
    """Features, classes and pictures of four images, for TensorBoard's projector."""
    path = folder / "tensorboard" / f"{step:05d}" / "features"
    path.mkdir(parents=True)
    (path / "tensors.tsv").write_text("1\t0\n0\t1\n1\t1\n0\t2\n")
    (path / "metadata.tsv").write_text("class\tnumber\na\t0\nb\t1\na\t2\nb\t3\n")
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(path / "sprite.png")
