"""Detection benchmark's command: ``python -m ssl_vit.benchmark detection``."""

from __future__ import annotations

from functools import partial

from ssl_vit.benchmarks.detection import measure_detection
from ssl_vit.benchmarks.speed_tables import detection_tables
from ssl_vit.commands.benchmarking import deliver, show
from ssl_vit.commands.detection_options import DetectionConfig


def measure(config: DetectionConfig) -> int:
    """Measure, print the table, and write the report; returns the exit status."""
    deliver(measure_detection(config), partial(show, detection_tables), config.out)
    return 0
