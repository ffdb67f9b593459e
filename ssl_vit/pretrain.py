"""The pretraining door: ``python -m ssl_vit.pretrain mae [--config FILE] [--group.option ...]``."""

from __future__ import annotations

import logging
import re
import shlex
import time
from dataclasses import asdict, replace
from typing import Any

import torch

from ssl_vit.cli import (
    find_recipe,
    layered,
    recipes,
    run_door,
    show_table,
    split_config,
    subcommand,
)
from ssl_vit.data.photometric import left_out
from ssl_vit.encoder import parameter_count
from ssl_vit.evaluators.features import Embed, pixels, pooled, ready
from ssl_vit.evaluators.linear import LinearProtocol
from ssl_vit.evaluators.protocol import protocol_card
from ssl_vit.evaluators.watch import Table, Watch, read_table, write_table
from ssl_vit.methods.base import Method, find_method, method_names
from ssl_vit.session import (
    PretrainConfig,
    Session,
    build,
    default_options,
    prepare_folder,
    train,
)
from ssl_vit.training.metrics import duration
from ssl_vit.training.resume import CONFIG_FILE
from ssl_vit.weights.exchange import ENCODER_FILE, sha256

log = logging.getLogger("ssl_vit")
_PROG = "python -m ssl_vit.pretrain"
_ABOUT = "Pretrain a Vision Transformer on images without labels."


def read_config(argv: list[str]) -> tuple[str, type[Method], PretrainConfig[Any]]:
    """The method's name and class, and the options: defaults < method < YAML < command line."""
    name = subcommand(argv, _PROG, "method", method_names())
    configs, flags = split_config(argv[1:])
    method = find_method(name)
    given = any(f.split("=")[0] == "--data.train" for f in flags)
    if not configs and not given and f"{name}_digits" in recipes():
        configs = [f"{name}_digits"]
        if "--help" not in flags and "-h" not in flags:
            log.info("no --config and no --data.train: using the recipe %s", configs[0])
    default = default_options(PretrainConfig, method)
    kind = PretrainConfig[method.Config]  # type: ignore[name-defined]
    files = [find_recipe(c) for c in configs]
    config = layered(default, files, flags, f"{_PROG} {name}", _ABOUT, kind)
    if not config.run.out:
        out = f"runs/{name}-{slug(config.data.train)}"
        config = replace(config, run=replace(config.run, out=out))
    return name, method, config


def slug(spec: str) -> str:
    """A short name for a data set, fit for a folder: its last part that has a letter."""
    parts = [re.sub(r"[^A-Za-z0-9]+", "-", p).strip("-") for p in re.split(r"[:/]", spec)]
    named = [p for p in parts if re.search("[A-Za-z]", p) and p not in ("train", "val", "test")]
    return named[-1] if named else "data"


def show_plan(session: Session) -> None:
    """The table before the first step: what will run, with every derived number resolved."""
    trainer, optim, order = session.trainer, session.config.optim, session.order
    encoder, schedule = session.method.exported_encoder(), session.trainer.schedule
    device, per_epoch = session.parallel.device, order.steps_per_epoch
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    size = "x".join(map(str, encoder.image_size))
    rate = f"{optim.peak_lr:.4g}"
    rate += "" if optim.lr is not None else f" = {optim.base_lr:g} x {optim.batch_size} / 256"
    warmup = f"{schedule.warmup} steps"
    if schedule.shortened:
        warmup += f" (half the run; --optim.warmup asks for {schedule.shortened})"
    held_out = f"{len(session.images.val):,} held out"
    held_out = held_out if session.images.held_out else "none held out"
    split = f"{session.parallel.world} processes x {optim.accumulate} parts x "
    split += str(optim.batch_size // (session.parallel.world * optim.accumulate))
    show_table(
        f"{session.name}: {session.out}",
        [
            ("device", f"{name}, {torch.get_num_threads()} threads"),
            ("precision", str(trainer.precision).removeprefix("torch.")),
            ("encoder", f"{encoder.config.arch}, {size} px, patch {encoder.patch_size}"),
            ("parameters", f"{counted(encoder)} encoder, {counted(session.method)} in all"),
            ("images", f"{order.n:,} train, {held_out}"),
            ("views", describe_views(session)),
            ("effective batch", f"{optim.batch_size} = {split}"),
            ("learning rate", rate),
            ("steps", f"{schedule.total:,} = {schedule.total / per_epoch:g} epochs x {per_epoch}"),
            ("warm-up", warmup),
        ],
    )


def describe_views(session: Session) -> str:
    """The crops of an image, and which photometric operations its channels do not allow."""
    crops = session.views().crops
    counts: dict[str, int] = {}
    for crop in crops:
        size = "x".join(map(str, crop.size))
        counts[size] = counts.get(size, 0) + crop.count
    deep, channels = session.images.deep, session.config.data.channels
    missing = {
        name: None
        for crop in crops
        if crop.photometric
        for name in left_out(crop.photometric, channels, bounded=not deep)
    }
    text = " + ".join(f"{n} of {size} px" for size, n in counts.items())
    if missing:
        depth = "more than 8 bits" if deep else "8 bits"
        text += f"; for images of {channels} channels and {depth} left out: {', '.join(missing)}"
    return text


def counted(module: torch.nn.Module) -> str:
    """A module's weights in millions."""
    return f"{parameter_count(module) / 1e6:.2f} M"


def show_results(session: Session) -> None:
    """The closing words: scores, where the files are, and what to try next."""
    watch, out, data = session.watch(), session.out, session.config.data
    if watch.labelled:
        show_scores(session, watch)
    print(f"encoder:  {out / ENCODER_FILE}")
    for picture in sorted(out.glob("*.png")):
        print(f"picture:  {picture}")
    print(f"curves:   tensorboard --logdir {shlex.quote(str(out))}")
    print("try next:")
    if watch.labelled and data.val:
        sets = f"--data.train {shlex.quote(data.train)} --data.val {shlex.quote(data.val)}"
        print(f"  python -m ssl_vit.evaluate linear --encoder {shlex.quote(str(out))} {sets}")
    print(f"  {_PROG} {session.name} --data.train folder:PATH_TO_YOUR_IMAGES")


def show_scores(session: Session, watch: Watch) -> None:
    """The table of scores; measured once for an encoder file, then read from ``results.json``."""
    path, encoder_file = session.out / "results.json", session.out / ENCODER_FILE
    identity = sha256(encoder_file)
    table = read_table(path, identity)
    if table is None:
        table = measure(session, watch)
        encoder = {"file": str(encoder_file), "sha256": identity, **asdict(session.info())}
        card = protocol_card(
            "pretrain",
            encoder,
            watch.view,
            {
                "train": {"source": watch.train.spec, "images": len(watch.train)},
                "val": {"source": watch.val.spec, "images": len(watch.val)},
            },
            options=asdict(session.config),
            probe=asdict(LinearProtocol(seed=watch.seed)),
            precision=str(watch.precision).removeprefix("torch."),
        )
        write_table(path, table, card)
    rows = [(n, f"{row['knn'].top1:.1f}", f"{row['linear'].top1:.1f}") for n, row in table.items()]
    k = table["raw pixels"]["knn"].setting
    title = f"accuracy in %, {len(watch.val):,} held-out images, {len(watch.train):,} to learn from"
    show_table(title, rows, header=("features", f"k-NN {k}", "linear"))


def measure(session: Session, watch: Watch) -> Table:
    """Raw pixels, the untrained encoder and the trained one, under one protocol."""
    encoders = {"random encoder": session.untrained_encoder()}
    encoders[f"{session.name} encoder"] = session.method.exported_encoder()
    entries: dict[str, Embed] = {"raw pixels": pixels}
    for name, encoder in encoders.items():
        ready(encoder, session.parallel.device)
        entries[name] = pooled(encoder)
    return watch.compare(entries)


def main(argv: list[str]) -> int:
    """The door; returns the exit status."""
    started = time.perf_counter()
    name, kind, config = read_config(argv)
    session = build(name, kind, config)
    prepare_folder(session)
    if session.parallel.main:
        show_plan(session)
    finished = session.trainer.step >= session.trainer.schedule.total or train(session)
    if not session.parallel.main:
        return 0
    if not finished:
        again = f"{_PROG} {name} --config {shlex.quote(str(session.out / CONFIG_FILE))}"
        log.info("stopped at step %d, saved; go on with: %s", session.trainer.step, again)
        return 130
    show_results(session)
    log.info("done in %s", duration(time.perf_counter() - started))
    return 0


if __name__ == "__main__":
    run_door(main)
