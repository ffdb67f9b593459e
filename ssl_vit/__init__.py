"""Self-supervised pretraining of Vision Transformers.

``python -m ssl_vit.pretrain METHOD`` trains an encoder by a method of ``ssl_vit/methods``.
``ssl_vit.load_encoder(PATH)`` loads it, and ``ssl_vit.load_model(PATH)`` a classifier, segmenter,
depth estimator or detector trained on one.
"""

from typing import TYPE_CHECKING, Any

from ssl_vit.common.waiting import set_waits

set_waits()  # before anything here imports torch

if TYPE_CHECKING:
    from ssl_vit.api import LoadedEncoder as LoadedEncoder
    from ssl_vit.api import LoadedModel as LoadedModel
    from ssl_vit.api import load_encoder as load_encoder
    from ssl_vit.api import load_model as load_model

__version__ = "0.1.0"
__all__ = ["LoadedEncoder", "LoadedModel", "load_encoder", "load_model"]


def __getattr__(name: str) -> Any:
    """Lazy import of the API, so that importing a part of the package loads no more than it."""
    if name in __all__:
        from ssl_vit import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
