"""The private Slurm, once for all tests that need it."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import DAEMONS, Cluster, find


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm of two nodes; tests are skipped where Slurm is not installed."""
    missing = [name for name in DAEMONS if not find(name)]
    if missing:
        pytest.skip(f"no {', '.join(missing)} on this machine; Debian: apt-get install slurm-wlm")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
