"""Evaluators of one encoder, by name, with their options; what runs each is in ``probing``."""

from ssl_vit.commands.attentive_options import AttentiveConfig
from ssl_vit.commands.eval_options import EvalConfig, KnnConfig, LinearConfig, SegmentConfig
from ssl_vit.commands.retrieval_options import CopiesConfig, RetrievalConfig

PROBES: dict[str, type[EvalConfig]] = {
    "knn": KnnConfig,
    "linear": LinearConfig,
    "attentive": AttentiveConfig,
    "retrieval": RetrievalConfig,
    "copies": CopiesConfig,
    "segment": SegmentConfig,
}
