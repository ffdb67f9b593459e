"""Shapes in signatures are checked in every test: jaxtyping's annotations, by beartype."""

import os
import signal

# What tests start must heed them, as they send them; under nohup, or started by a script in the
# background, it would ignore them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# Several test processes share the cores: threads of one would wait for those of another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else each process that tests start would compile the package anew, for a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import jaxtyping  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

from tests import shapes  # noqa: E402

jaxtyping.jaxtyped = shapes.checked  # which the hook applies to every function
install_import_hook("ssl_vit", "beartype.beartype")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("SSL_VIT_SHARED", ROOT.parent / "shared"))
# Files that take longest, the longest first: started last, one of them would run alone at the end.
LONG = (
    "slurm/test_slurm.py",
    "contract/test_together.py",
    "integration/test_quality.py",
    "integration/test_pretrain.py",
    "integration/test_report.py",
    "contract/test_cost.py",
    "distributed/test_faults.py",
    "unit/commands/test_preflight.py",
    "unit/commands/test_tuned.py",
    "contract/test_training.py",
    "contract/test_adapters.py",
    "integration/test_launch.py",
    "integration/test_dense_tuning.py",
    "integration/test_journeys.py",
    "integration/test_dino_run.py",
    "unit/commands/test_beginning.py",
    "unit/evaluators/test_online.py",
    "unit/commands/test_evaluate.py",
    "contract/test_pictures.py",
    "unit/evaluators/test_depth.py",
    "contract/test_freezing.py",
    "unit/benchmarks/test_scale.py",
    "distributed/test_two_processes.py",
    "integration/test_finetune.py",
    "contract/test_cuda.py",
    "integration/test_example_method.py",
    "integration/test_resume.py",
    "contract/test_recompiles.py",
    "integration/test_preflight.py",
    "unit/weights/test_outgoing.py",
    "integration/test_detect.py",
    "integration/test_runs.py",
    "integration/test_visualize.py",
    "integration/test_shared_files.py",
    "unit/evaluators/test_linear.py",
    "unit/weights/test_weights_dinov3.py",
    "unit/model/test_encoder.py",
    "contract/test_rotary.py",
    "unit/data/test_tiles.py",
    "unit/commands/test_embed.py",
    "integration/test_docs.py",
    "unit/evaluators/test_segment.py",
    "contract/test_nearness.py",
    "integration/test_hostile_files.py",
)


def wants_gpu(args: list[str]) -> bool:
    """True if all that is asked for lies in ``tests/gpu``: then alone tests see a GPU.

    The others compare bytes, and say which device they mean by nothing more than ``auto``.
    """
    paths = [Path(arg.split("::")[0]).resolve() for arg in args]
    return bool(paths) and all(path.is_relative_to(ROOT / "tests" / "gpu") for path in paths)


def pytest_configure(config: pytest.Config) -> None:
    """pytest-xdist would begin with the files that have most tests, which are not the longest."""
    config.option.loadscopereorder = False
    if not wants_gpu(config.args):  # before torch looks; processes that tests start inherit it
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process of tests more than there are cores: those of Slurm wait most of the time."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first."""
    place = {ROOT / "tests" / name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the project; tests that need it are skipped without it."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set SSL_VIT_SHARED")
    return folder
