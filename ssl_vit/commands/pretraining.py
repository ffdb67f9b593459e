"""Training commands: running a session from start to results; pretraining setup from options."""

from __future__ import annotations

import functools
import logging
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ssl_vit.commands.beginning import Looks, with_choice
from ssl_vit.commands.cli import RESUMABLE, layered, show_table
from ssl_vit.commands.pretrain_options import PretrainConfig, default_options
from ssl_vit.common.checks import flag
from ssl_vit.common.duration import duration
from ssl_vit.common.errors import check
from ssl_vit.common.rates import SPARING, SPARING_ADAPTERS
from ssl_vit.common.seeds import fold
from ssl_vit.common.task import Task
from ssl_vit.common.terminal import outliving_readers
from ssl_vit.data.base import Source, known_labels
from ssl_vit.data.description import far_from_black
from ssl_vit.data.images import Given, Images, open_images
from ssl_vit.data.view import View
from ssl_vit.evaluators.watch import Watch, bounded, labelled_only, why_no_knn
from ssl_vit.methods import find_options
from ssl_vit.methods.base import Method, find_method
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.execution import nothing_compiled
from ssl_vit.records.recording import by_signal, recorded
from ssl_vit.training.metrics import RunLog, note_outcome
from ssl_vit.training.run_files import CONFIG_FILE, complete
from ssl_vit.training.run_lock import locked
from ssl_vit.training.session import Session, counted, prepare_folder, train
from ssl_vit.training.shards import Parts, load_parts
from ssl_vit.weights.adapting import adapted
from ssl_vit.weights.exchange import EncoderInfo, encoder_writer, load_strictly, read_info, sha256
from ssl_vit.weights.official import open_weights, weights_info
from ssl_vit.weights.own_files import BEST_FILE, ENCODER_FILE

log = logging.getLogger("ssl_vit")
S = TypeVar("S", bound=Session)


def carry_out(
    session: S,
    about: list[tuple[str, str]],
    results: Callable[[S], dict[str, float]],
    command: str,
) -> int:
    """Training run: begin or resume, print the plan, train, print the results; the exit status.

    It is the same in every process: 0 when finished; when stopped and saved, 130 by Ctrl-C and
    ``RESUMABLE`` by another signal. The terminal may be closed meanwhile.

    Args:
        about: plan rows on what is trained.
        results: prints the results in the main process and returns the scores by name.
        command: the command; with ``--config FILE`` it resumes a stopped run.

    Raises:
        UserError: among others, another run uses the folder.
    """
    main = session.parallel.main
    with outliving_readers(), locked(session.out, main) as session.lock:
        return _carry_out(session, about, results, command)


def _carry_out(
    session: S,
    about: list[tuple[str, str]],
    results: Callable[[S], dict[str, float]],
    command: str,
) -> int:
    """Run of a session, as :func:`carry_out`, in a folder that is locked for it."""
    started = time.perf_counter()
    prepare_folder(session)
    if session.parallel.main:
        show_table(f"{session.name}: {session.out}", session.plan(about))
        for line in session.images.warnings:
            log.warning("warning: %s", line)
    with recorded(session, command) as note:
        stopped = train(session) if session.trainer.step < session.trainer.schedule.total else 0
        if stopped:
            note("stopped", by_signal(stopped))
            again = f"{command} --config {shlex.quote(str(session.out / CONFIG_FILE))}"
            step = session.trainer.step
            log.info("stopped at step %d%s; resume with: %s", step, ", saved" * bool(step), again)
            return 130 if stopped == signal.SIGINT else RESUMABLE
        session.task = session.trainer.whole()
        if session.parallel.main:
            with nothing_compiled(session.config.run.compile):
                outcome = results(session)
            session.guard()
            if note.writes:
                note_outcome(session.out, session.trainer.step, session.options(), outcome)
            note("finished")
            log.info("done in %s", duration(time.perf_counter() - started))
    session.parallel.any(False)  # processes exit together: a launcher may kill those that remain
    return 0


class Pretraining(Session):
    """Pretraining run: a method training its encoder, which is exported and monitored."""

    task: Method

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the images and of the files of ``--init.encoder`` and the method's
        encoders."""
        names = {"init.encoder": self.config.init.encoder}
        method = self.config.method
        names |= {
            f"{method.prefix}.{option}": getattr(method, option) for option in self.task.encoders
        }
        paths = {option: weights_info(name)[1] for option, name in names.items() if name}
        weights = {option: sha256(path) for option, path in paths.items() if path}
        return {**self.images.fingerprint, "weights": weights}

    def info(self) -> EncoderInfo:
        """Metadata of the encoder file, now."""
        encoder = self.task.exported_encoder()
        return EncoderInfo(
            config=encoder.config,
            channels=encoder.channels,
            mean=self.images.mean,
            std=self.images.std,
            method=self.name,
            step=self.trainer.step,
        )

    def export(self, whole: Task) -> Callable[[], object]:
        """Snapshot of the encoder; the returned function writes its file."""
        assert isinstance(whole, Method)
        return encoder_writer(self.out / ENCODER_FILE, whole.exported_encoder(), self.info())

    def exported_step(self) -> int | None:
        """Step of the encoder file; None: there is no file."""
        file = self.out / ENCODER_FILE
        return read_info(file).step if file.is_file() else None

    def probe(self, whole: Task, step: int, log: RunLog) -> None:
        """Evaluation during training: health, k-NN, pictures and the feature projection."""
        assert isinstance(whole, Method)
        watch, encoder = self.watch, whole.exported_encoder()
        given, news = bool(self.config.init.encoder), ""
        look = watch.look(encoder, select=given)
        numbers, held_out = look.numbers, look.held_out
        if given:
            numbers = numbers | self.looks.add(step, look)
            news = self.looks.news()
            self._keep_best(step, encoder)
        log.write(step, numbers, "probe")
        if news:
            log.warn(step, news)
        for name, picture in watch.paint(whole.panels, encoder, held_out).items():
            log.picture(step, name, picture)
        log.projection(step, *watch.projection(held_out))

    @functools.cached_property
    def looks(self) -> Looks:
        """Looks at an encoder that began with given weights, up to the present step."""
        return Looks.read(self.out, self.trainer.step)

    def looks_at_once(self, due: bool) -> bool:
        """True at given weights before they are trained; and where a kill came before the probe
        did."""
        step = self.trainer.step
        late = due and self.watch.labelled and not self.looks.has(step)
        return bool(self.config.init.encoder) and (step == 0 or late)

    def _keep_best(self, step: int, encoder: Encoder) -> None:
        """Write the encoder if it is the best so far; before its row, which says that it is."""
        best = self.looks.best
        if best is not None and best["step"] == step:
            self.guard()
            encoder_writer(self.out / BEST_FILE, encoder, self.info())()

    def about(self) -> list[tuple[str, str]]:
        """Plan rows on the encoder."""
        encoder = self.task.exported_encoder()
        size = "x".join(map(str, encoder.image_size))
        rows = [
            ("encoder", f"{encoder.config.arch}, {size} px, patch {encoder.patch_size}"),
            ("parameters", f"{counted(encoder)} encoder, {counted(self.task)} in all"),
        ]
        given, near = bool(self.config.init.encoder), self.config.init.keep_near
        rows += [("kept near the start", f"x {near:g}")] if near else []
        if self.task.adapters is not None:
            said = f"rank {self.config.init.lora}, {counted(self.task.adapters)}, in its place"
            rows += [("trained of the encoder", said)]
        reason = self.why_no_knn() if given or known_labels(self.images.train).any() else ""
        unseen = ", so that nothing shows whether the given weights get worse" if given else ""
        if given and not reason:
            why = f": {self.images.no_choice}" if self.images.no_choice else ""
            rows.append(("best encoder", f"chosen by {self.chosen_by}{why}"))
        said = f"not measured while training: {reason}{unseen}"
        return rows + ([("k-NN", said)] if reason else [])

    @property
    def chosen_by(self) -> str:
        """Selection criterion of the best encoder, in words."""
        if self.choice is None:
            return "leave-one-out k-NN of training images"
        return f"k-NN of {len(self.choice):,} images held out for this alone"

    def untrained_encoder(self) -> Encoder:
        """Encoder with its weights before the first step."""
        kind = type(self.trainer.blank)  # the type of a sharded task is changed by FSDP
        assert issubclass(kind, Method)
        return initial_method(kind, self.config).exported_encoder()

    def why_no_knn(self) -> str:
        """Reason why no k-NN is measured while training; empty if it is."""
        if not self.images.held_out:  # each image would be its own nearest neighbour
            return "no image is held out"
        return why_no_knn(*self.watched)

    @functools.cached_property
    def watched(self) -> tuple[Source, Source]:
        """Training images, with a label if any have, and held-out ones, to probe the encoder on."""
        count, seed = self.config.run.probe_images, self.config.run.seed
        train = bounded(labelled_only(self.images.train), count, seed)
        return train, bounded(self.images.val, count, seed)

    @functools.cached_property
    def choice(self) -> Source | None:
        """Images that the best encoder is chosen by, those with a label; None: training images."""
        images, run = self.images.choice, self.config.run
        if images is None:
            return None
        return bounded(labelled_only(images), run.probe_images, run.seed)

    @functools.cached_property
    def watch(self) -> Watch:
        """Monitor of the encoder, on bounded numbers of training and held-out images."""
        run, images = self.config.run, self.images
        encoder = self.task.exported_encoder()
        view = View(encoder.image_size, encoder.channels, images.mean, images.std)
        return Watch(
            train=self.watched[0],
            val=self.watched[1],
            view=view,
            device=self.parallel.device,
            precision=self.trainer.precision,
            workers=self.config.data.workers,
            seed=run.seed,
            labelled=not self.why_no_knn(),
            choice=self.choice,
            pooling=self.task.pooling,
        )


def initial_method(kind: type[Method], config: PretrainConfig[Any]) -> Method:
    """Method with its initial weights, a function of the options, the seed and ``init.encoder``.

    Raises:
        UserError: the weights of ``init.encoder`` cannot be opened, or do not match.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        method = kind(config.method, config.encoder, config.data.channels)
    if config.init.encoder:
        given = open_weights(config.init.encoder, config.encoder.image_size)
        where = f"--init.encoder {config.init.encoder}"
        state, notes = adapted(given.encoder, method.encoder, config.init.channels, where)
        method.begin_with(state, where)
        if config.init.keep_near:
            method.stay_near(config.init.keep_near)
        report = "; ".join([given.report, *notes])
        log.info("initial weights from %s: %s, %s", given.path, given.format, report)
        if config.init.heads:
            _begin_with_all(method, given.path, f"{flag(config.init, 'heads')} True")
    if config.init.lora:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold(config.run.seed, config.init.lora))
            method.adapt(config.init.lora)
    return method


def _begin_with_all(method: Method, file: Path, option: str) -> None:
    """Take all weights of the run that ``file`` is the encoder of; positions are resampled.

    What the run does not have, and has begun as the encoder by now (a teacher of Gram anchoring),
    stays so.

    Raises:
        UserError: it is no run of this method, or other weights do not match.
    """
    name, folder = type(method).__module__.rpartition(".")[2], file.parent
    about = f"{option}: {folder}"
    whole = whole_method(folder) if file.name == ENCODER_FILE else None
    rule = f"is no run folder of pretrain {name} with checkpoints and {CONFIG_FILE}"
    check(whole is not None and type(whole) is type(method), f"{about} {rule}")
    assert whole is not None
    state, own = whole.for_size(method.encoder.image_size).state_dict(), method.state_dict()
    encoders = [(f"{n}.", part) for n, part in method.named_modules() if isinstance(part, Encoder)]
    begun = tuple(start for start, _ in encoders)
    kept = {n: v for n, v in own.items() if n not in state and n.startswith(begun)}
    # Sine-cosine tables are a formula for any size.
    fixed = [start for start, part in encoders if part.config.positions == "sincos"]
    kept |= {n: own[n] for n in (f"{start}vit.pos_embed" for start in fixed) if n in own}
    log.info("all weights of %s, %s", folder, load_strictly(method, state | kept, about))


def whole_method(folder: Path) -> Method | None:
    """The method of a run, from its newest whole checkpoint; None: there is no such thing.

    Raises:
        UserError: a checkpoint that does not match the run's own configuration.
    """
    found = complete(folder / "checkpoints")
    if not found or not (folder / CONFIG_FILE).is_file():
        return None
    name = read_info(folder / ENCODER_FILE).method
    own, kind = find_options(name), find_method(name)
    read = PretrainConfig[own.config]  # type: ignore[name-defined]
    default = default_options(PretrainConfig, own)
    options: PretrainConfig[Any] = layered(default, [folder / CONFIG_FILE], [], "", "", read)
    method = kind.blank(options.method, options.encoder, options.data.channels)
    if options.init.lora:
        method.adapt(options.init.lora)
    parts = Parts(sorted(found[-1].glob("task*.safetensors")))
    log.info("%s: the whole method, %s", found[-1], load_parts(method, parts))
    method.adapters = None  # what they add is in the encoder
    return method


def with_weights(
    default: PretrainConfig[Any], info: EncoderInfo, heads: bool, lora: bool = False
) -> PretrainConfig[Any]:
    """Default options for initial weights: the encoder's architecture and channels, and rates that
    spare it from new heads; ``heads``: they come with it; ``lora``: adapters are trained, which
    are small, and have the whole rate."""
    encoder = replace(info.config, drop_path=default.encoder.drop_path)
    sparing = {} if heads else SPARING_ADAPTERS if lora else SPARING
    optim = replace(default.optim, **sparing)
    data = replace(default.data, channels=info.channels)
    return replace(default, encoder=encoder, data=data, optim=optim)


def with_statistics(config: PretrainConfig[Any], info: EncoderInfo) -> PretrainConfig[Any]:
    """Options with the statistics of the initial encoder, where none are given, or wanted of the
    images, or of other channels."""
    data = config.data
    if data.mean or data.statistics == "auto" or data.channels != info.channels:
        return config
    return replace(config, data=replace(data, mean=info.mean, std=info.std))


def build(name: str, config: PretrainConfig[Any]) -> Pretraining:
    """Pretraining run built from its options; nothing is written yet.

    Raises:
        UserError: options contradict each other, or images do not exist.
    """
    method, given = initial_method(find_method(name), config), None
    if config.init.encoder:
        info = weights_info(config.init.encoder, config.encoder.image_size)[0]
        given = Given(f"--init.encoder {config.init.encoder}", info.mean, info.std)
    images: Images = open_images(config.data, config.run.seed, given)
    if config.init.encoder:
        images = with_choice(images, config.data, config.optim.batch_size, config.run.seed)
    method.set_statistics(images.mean, images.std)
    views = method.view_spec(config.method, method.encoder)
    images.warnings += tuple(far_from_black(views.last, images.mean, images.std))
    made = Pretraining(name, config, method, views, images)
    check(
        not (config.init.lora and made.parallel.sharded),
        f"{flag(config.init, 'lora')} is {config.init.lora}; adapters are not sharded: give "
        "--run.parallel ddp",
    )
    return made
