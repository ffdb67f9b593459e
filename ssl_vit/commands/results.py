"""Results of a pretraining run: the table of scores, the files, and what to try next."""

from __future__ import annotations

import shlex
from dataclasses import asdict

from ssl_vit.commands.beginning import verdict
from ssl_vit.commands.cli import show_table
from ssl_vit.commands.pretraining import Pretraining
from ssl_vit.evaluators.features import Embed, pixels, pooled, ready
from ssl_vit.evaluators.linear import LinearProtocol
from ssl_vit.evaluators.protocol import protocol_card
from ssl_vit.evaluators.score import BEST, GIVEN, PIXELS, RANDOM
from ssl_vit.evaluators.watch import ScoreTable, Watch, read_scores, write_scores
from ssl_vit.records.run_folder import read_run
from ssl_vit.weights.exchange import load_encoder, sha256
from ssl_vit.weights.own_files import BEST_FILE, ENCODER_FILE


def show_results(session: Pretraining) -> dict[str, float]:
    """Print the scores, the files of the run and what to try next; returns the scores."""
    watch, out, data = session.watch, session.out, session.config.data
    loss = read_run(out).latest("loss")
    outcome = {} if loss is None else {"final/loss": loss}
    if watch.labelled:
        outcome |= show_scores(session, watch)
    print(f"encoder:  {out / ENCODER_FILE}")
    for picture in sorted(out.glob("*.png")):
        print(f"picture:  {picture}")
    print(f"curves:   tensorboard --logdir {shlex.quote(str(out))}")
    print(f"report:   python -m ssl_vit.report {shlex.quote(str(out))}")
    print("try next:")
    if watch.labelled and data.val:
        sets = f"--data.train {shlex.quote(data.train)} --data.val {shlex.quote(data.val)}"
        print(f"  python -m ssl_vit.evaluate linear --encoder {shlex.quote(str(out))} {sets}")
    print(f"  python -m ssl_vit.pretrain {session.name} --data.train folder:PATH_TO_YOUR_IMAGES")
    return outcome


def show_scores(session: Pretraining, watch: Watch) -> dict[str, float]:
    """Print the table of scores; returns those of the trained encoder.

    They are measured once for each encoder file, and then read from ``results.json``.
    """
    path, encoder_file = session.out / "results.json", session.out / ENCODER_FILE
    identity = sha256(encoder_file)
    table = read_scores(path, identity)
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
        session.guard()
        write_scores(path, table, card)
    rows = [
        (n, f"{row['knn'].value:.1f}", f"{row['linear'].value:.1f}") for n, row in table.items()
    ]
    k = table[PIXELS]["knn"].setting
    kind = "accuracy" if watch.val.targets is None else "mean average precision"
    title = f"{kind} in %, {len(watch.val):,} held-out and {len(watch.train):,} training images"
    show_table(title, rows, header=("features", f"k-NN {k}", "linear"))
    if words := verdict(session.looks, session.trainer.step, session.out, session.chosen_by):
        print(words)
    own = table[f"{session.name} encoder"]
    return {f"final/{evaluator}": score.value for evaluator, score in own.items()}


def measure(session: Pretraining, watch: Watch) -> ScoreTable:
    """Scores of raw pixels, the untrained encoder and the trained one, under one protocol."""
    first = GIVEN if session.config.init.encoder else RANDOM
    encoders = {first: session.untrained_encoder()}
    encoders[f"{session.name} encoder"] = session.task.exported_encoder()
    best = session.looks.best
    if best is not None and 0 < best["step"] < session.trainer.step:
        encoders[f"{BEST}, step {best['step']}"] = load_encoder(session.out / BEST_FILE)[0]
    entries: dict[str, Embed] = {PIXELS: pixels}
    for name, encoder in encoders.items():
        ready(encoder, session.parallel.device)
        entries[name] = pooled(encoder)
    return watch.compare(entries)
