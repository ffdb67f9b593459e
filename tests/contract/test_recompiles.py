"""Compiled blocks start anew for no step: graphs of fixed shapes, all made in the first two.

With the attention and the whole branches of CUDA, on the CPU; in a process in which annotations are
not checked, which no compiler follows.
"""

import json

import pytest

from ssl_vit.methods import method_names
from tests.integration.conftest import Door

SCRIPT = """
import functools, json, shutil, sys, tempfile
import torch
from ssl_vit.benchmarks.speed import trainer_midway
from ssl_vit.commands.pretraining import Pretraining
from ssl_vit.common.config import OptimConfig, RunConfig
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.batch import Batch
from ssl_vit.evaluators.options import TuneConfig
from ssl_vit.model.execution import choose_attention, compile_blocks
from ssl_vit.training.session import prepare_folder, train
from tests.contract import tiny
from tests.unit.commands.test_finetune import batch, tuned

# What was traced is run as it is: no compiler of C++ is needed. A broken graph is an error.
torch.compile = functools.partial(torch.compile, backend="eager", fullgraph=True)


def pretraining(name):
    made = tiny.session(name, "--encoder.drop-path", "0.4", "--run.compile", "True")
    loaded = tiny.batches(made)
    return made.trainer, [next(loaded) for _ in range(4)]


def fine_tuning():
    task = tuned(TuneConfig(drop_path=0.4))
    compile_blocks(task)
    options = RunConfig(length="10ep"), OptimConfig(clip=1.0), Normalize((0.5,) * 3, (0.2,) * 3)
    trainer = trainer_midway(task, *options, torch.device("cpu"), torch.bfloat16)
    return trainer, [Batch(batch(key=key)) for key in range(4)]


def graphs_now():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def probes():
    seen, probe, out = [], Pretraining.probe, tempfile.mkdtemp()
    made = tiny.session(sys.argv[1], "--run.compile", "True", "--run.out", out)

    def counted(*args):
        before = graphs_now()
        probe(*args)
        seen.append((before, graphs_now()))

    Pretraining.probe = counted
    prepare_folder(made)
    train(made)
    shutil.rmtree(out)
    return seen


print(json.dumps(["probes", probes()]), flush=True)
for name in sys.argv[1:]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer, batches = fine_tuning() if name == "finetune" else pretraining(name)
    choose_attention(trainer.task, torch.device("cuda", 0))
    trainer.task.train()
    graphs = []
    for batch_ in batches:
        trainer.update([batch_])
        trainer.step += 1
        graphs.append(graphs_now())
    print(json.dumps([name, graphs]), flush=True)
"""
NAMES = (*method_names(), "finetune")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Graphs that there are after each of four steps."""
    door = Door(tmp_path_factory.mktemp("graphs"))
    (door.folder / "script.py").write_text(SCRIPT)
    done = door("script.py", *NAMES)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    return dict(json.loads(line) for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_no_step_after_the_second_compiles(name, graphs):
    """Of all sizes of crops, with stochastic depth, which drops other rows in every step."""
    first, second, *_, last = graphs[name]
    assert first > 0
    assert second == last


def test_a_probe_compiles_nothing(graphs):
    """Its batches have other sizes; the steps before it compiled."""
    ((before, after),) = graphs["probes"]
    assert before == after > 0
