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

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("ssl_vit", "beartype.beartype")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("SSL_VIT_SHARED", ROOT.parent / "shared"))
# Files that take longest, the longest first: started last, one of them would run alone at the end.
LONG = (
    "slurm/test_slurm.py",
    "distributed/test_faults.py",
    "contract/test_together.py",
    "contract/test_cost.py",
    "integration/test_report.py",
    "integration/test_journeys.py",
    "integration/test_one_folder.py",
    "integration/test_quality.py",
    "integration/test_resume.py",
    "integration/test_finetune.py",
    "distributed/test_two_processes.py",
    "integration/test_launch.py",
    "integration/test_pretrain.py",
    "unit/evaluators/test_online.py",
    "integration/test_dino_run.py",
    "unit/weights/test_outgoing.py",
    "unit/evaluators/test_linear.py",
    "integration/test_runs.py",
    "unit/weights/test_weights_official.py",
    "unit/weights/test_weights_timm.py",
    "integration/test_visualize.py",
    "integration/test_preflight.py",
    "integration/test_benchmark.py",
    "unit/evaluators/test_segment.py",
    "unit/weights/test_weights_dinov3.py",
    "unit/training/test_watchdog.py",
    "unit/training/test_run_lock.py",
    "unit/weights/test_weights_hugging_face.py",
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
