"""Features of a source to a file: computed part by part, by any number of processes, resumably."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ssl_vit.commands.embed_features import chosen_features, embedding_of
from ssl_vit.commands.embed_options import EmbedConfig, check_place
from ssl_vit.commands.evaluating import look_at
from ssl_vit.common.distributed import gather_texts, rank_and_world, share
from ssl_vit.common.duration import duration
from ssl_vit.common.errors import RunFailed, UserError, check
from ssl_vit.data.base import describe_labels
from ssl_vit.data.eval_images import EvalImages
from ssl_vit.data.fingerprint import fingerprint
from ssl_vit.data.sources import Source, open_source
from ssl_vit.data.workers import load
from ssl_vit.evaluators.backbone import open_backbone
from ssl_vit.evaluators.cache import labels_sha256
from ssl_vit.evaluators.feature_files import FeatureTable, read_card, write_features
from ssl_vit.evaluators.feature_parts import Batches, Layout, Parts, Rows
from ssl_vit.evaluators.features import Machine, embedded, ready
from ssl_vit.evaluators.protocol import protocol_card
from ssl_vit.model.encoder import Encoder
from ssl_vit.training.parallel import loader_workers, resolve_precision, start_parallel
from ssl_vit.training.run_lock import RunLock, locked

log = logging.getLogger("ssl_vit")
_DAY = 24 * 60.0  # minutes that a process waits for one that has slower images
_SAID = 30.0  # seconds between two lines of progress


class Embedding:
    """Embedding: an encoder, a source, and the parts of its features that are there."""

    def __init__(self, config: EmbedConfig) -> None:
        """Open the images and the encoder; nothing is written.

        Raises:
            UserError: an option is missing or wrong, or no image can be read.
        """
        for option, value in (("encoder", config.encoder), ("data.train", config.data.train)):
            check(bool(value), f"--{option} is missing")
        check(bool(config.out), "--out is missing; a file named .npz, .parquet or .npy")
        self.config, self.out = config, Path(config.out).expanduser()
        check_place(self.out)
        self.backbone = open_backbone(config.encoder, 0, config.size)
        self.features = chosen_features(config, self.backbone)
        view = self.backbone.view
        self.source: Source = open_source(config.data.train, config.data, view.channels)
        log.info("labels of --data.train: %s", describe_labels(self.source))
        look_at(self.source, self.backbone)
        self.parallel = start_parallel(config.device, minutes=_DAY)
        device = self.parallel.device
        precision = resolve_precision(config.precision, device)
        self.machine = Machine(device, precision, config.data.workers, config.batch_size)
        if self.backbone.module is not None:
            ready(self.backbone.module, device)
        self.embed = embedding_of(self.backbone, self.features)
        layout = Layout(len(self.source), config.batch_size, self._shapes())
        self.parts = Parts(self.out.with_name(f"{self.out.name}.partial"), layout)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each feature of an image."""
        view, device = self.backbone.view, self.machine.device
        with torch.inference_mode():
            made = self.embed(torch.zeros(1, view.channels, *view.size, device=device))
        return {name: tuple(made[name].shape[1:]) for name in self.features}

    def card(self) -> dict[str, Any]:
        """Card of the features: all that decides what they are. Reads some hundred images."""
        source, module = self.source, self.backbone.module
        labels = source.labels if source.targets is None else source.targets
        group = source.reading.group
        about = {
            "source": source.spec,
            "images": len(source),
            "fingerprint": fingerprint(source),
            "labels": describe_labels(source),
            "labels_sha256": None if labels is None else labels_sha256(torch.from_numpy(labels)),
            "classes": None if source.classes is None else list(source.classes),
            "reading": source.reading.content | ({"group": group} if group else {}),
        }
        patch = module.patch_size if isinstance(module, Encoder) else 0
        grid = [side // patch for side in self.backbone.view.size] if patch else None
        made: dict[str, Any] = protocol_card(
            "embed",
            self.backbone.identity,
            self.backbone.view,
            {"data": about},
            features={name: list(shape) for name, shape in self.parts.layout.shapes.items()},
            grid=grid,
            batch_size=self.config.batch_size,
            **self.machine.card(),
        )
        return dict(json.loads(json.dumps(made)))

    def run(self) -> FeatureTable | None:
        """Compute the parts that are missing and write the file.

        All processes must call it; the main one gets the table, unless the file was there already.

        Raises:
            UserError: something else is in the place of the file or of its parts, another process
                writes it, or no image can be read.
            RunFailed: in all processes, if the data workers of one fail.
        """
        folder, main = self.parts.folder, self.parallel.main
        try:
            with locked(folder, main) as lock:
                card, there = self._begin()
                if there is None:
                    return None
                self._compute(sorted(set(range(self.parts.layout.parts)) - there), lock)
                return self._finish(FeatureTable(self.source, self.parts, card)) if main else None
        except UserError as error:
            raise UserError(str(error).replace("--run.out", "--out"), error.everywhere) from None
        finally:
            if main:
                with contextlib.suppress(OSError):  # there are parts in it
                    folder.rmdir()

    def _begin(self) -> tuple[dict[str, Any], set[int] | None]:
        """Card, in the main process, and the parts that are there; None if the file is."""
        card: dict[str, Any] = {}
        refusal, there = "", None
        if self.parallel.main:
            try:
                card = self.card()
                there = self._found(card)
            except UserError as error:
                refusal = str(error)
        refusal, there = json.loads(gather_texts(json.dumps([refusal, there]))[0])
        if refusal:
            raise UserError(refusal, everywhere=True)
        return card, None if there is None else set(there)

    def _found(self, card: dict[str, Any]) -> list[int] | None:
        """Parts that are there, of the same features; None if the file is, and shall stay."""
        found = read_card(self.out) if self.out.exists() else {}
        check(found is not None, f"--out is {str(self.out)!r}, a file that embed has not written")
        before = {} if self.config.resume == "never" else self.parts.card()
        if found and self.config.resume == "auto":
            other = difference(found, card)
            if not other:
                self.parts.clear()
                return None
            # Parts of these features are of a call with the option to replace the file.
            check(before == card, f"{self.out} {other}")
        if before and self.parts.begun:
            other = difference(before, card)
            check(not other, f"{self.parts.folder} {other}")
        else:
            self.parts.begin(card)
        there = self.parts.there()
        self._log_size(there)
        return there

    def _log_size(self, there: list[int]) -> None:
        """Log the size of what will be computed, and warn where the disk has no room for it."""
        layout, out = self.parts.layout, self.out
        shapes = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in layout.shapes.items())
        if done := min(len(there) * layout.part_size, layout.images):
            log.info("%s: goes on after %s images", self.parts.folder, f"{done:,}")
        size = layout.images * layout.row_bytes
        need = 2 * size - done * layout.row_bytes
        free = shutil.disk_usage(out.absolute().parent).free
        log.info("%s: %s images, %s: %s", out, f"{layout.images:,}", shapes, megabytes(size))
        if need > free:
            text = "warning: %s needs up to %s while it is put together, and %s are free"
            log.warning(text, out, megabytes(need), megabytes(free))

    def _compute(self, todo: list[int], lock: RunLock | None) -> None:
        """Compute this process' share of these parts; returns when all processes have theirs."""
        own = share(len(todo))
        failure = ""
        try:
            self._write([todo[i] for i in own], lock)
        except RunFailed as error:
            failure = str(error)
        if failures := [text for text in gather_texts(failure) if text]:
            raise RunFailed(failures[0], everywhere=True)

    def _write(self, own: list[int], lock: RunLock | None) -> None:
        """Compute and write these parts."""
        layout, view, machine = self.parts.layout, self.backbone.view, self.machine
        images = EvalImages(self.source, view.size, view.crop_ratio, view.channels)
        workers = loader_workers(machine.workers, machine.device) if own else 0
        batches = load(images, Batches(layout, own), workers, machine.device.type == "cuda")
        made, progress = embedded(self.embed, batches, view, machine), Progress(layout, own)
        for part in own:
            rows = []
            for features, batch in islice(made, len(layout.batches(part))):
                # A copy: the batch is in memory shared with a worker, which has room for few.
                rows.append(Rows(features, batch.views.keys.clone(), batch.bad))
                progress.add()
            if lock:
                lock.check()
            self.parts.write(part, rows)

    def _finish(self, table: FeatureTable) -> FeatureTable:
        """Put the file together, and remove the parts."""
        missing = set(table.numbers) - set(self.parts.there())
        if missing:
            raise RunFailed(
                f"{len(missing)} of {len(table.numbers)} parts are not in {self.parts.folder}: it "
                "must be on a disk that all processes share. The same command makes them"
            )
        left_out = table.unreadable
        for reason in left_out[:5]:
            log.warning("unreadable image left out: %s", reason)
        why = left_out[0] if left_out else ""
        check(table.rows > 0, f"no image of {self.source.spec} can be read: {why}")
        write_features(self.out, table)
        self.parts.clear()
        return table


class Progress:
    """Progress: a line every half minute on the batches of this process."""

    def __init__(self, layout: Layout, own: list[int]) -> None:
        self.batch_size = layout.batch_size
        self.total = sum(len(layout.batches(part)) for part in own)
        self.done = 0
        self.started = self.said = time.monotonic()

    def add(self) -> None:
        """Count a batch."""
        self.done += 1
        now = time.monotonic()
        if now - self.said < _SAID:
            return
        self.said, rate = now, self.done / (now - self.started)
        done, total = (f"{count * self.batch_size:,}" for count in (self.done, self.total))
        left = duration((self.total - self.done) / rate)
        of = " of this process" if rank_and_world()[1] > 1 else ""
        speed = f"{rate * self.batch_size:,.0f} images/s"
        log.info("%s of %s images%s, %s, %s left", done, total, of, speed, left)


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:,.1f} MB"


def difference(found: dict[str, Any], card: dict[str, Any]) -> str:
    """Difference between the features found and those of ``card``, and the remedy; empty if they
    are the same."""
    for group, now in card.items():
        before = found.get(group)
        if before == now:
            continue
        name, pairs = group, (before, now)
        if isinstance(before, dict) and isinstance(now, dict):
            key = next(k for k in {**now, **before} if before.get(k) != now.get(k))
            name, pairs = f"{group} {key}", (before.get(key), now.get(key))
        kinds = {"encoder": "another encoder", "data": "other images or labels"}
        what = kinds.get(group, "other options or versions")
        return (
            f"is of {what}: {name} was {pairs[0]!s:.64}, and is {pairs[1]!s:.64} now; give another "
            "--out, or --resume never to begin anew"
        )
    return ""
