"""Options of fine-tuning, before its encoder is known, which has a recipe of its own."""

from __future__ import annotations

from ssl_vit.commands.cli import find_recipe, layered, split_config
from ssl_vit.common.errors import UserError
from ssl_vit.evaluators.options import FinetuneConfig

PROG = "python -m ssl_vit.evaluate finetune"


def read_options(argv: list[str], default: FinetuneConfig) -> FinetuneConfig:
    """Options: ``default`` < YAML < command line."""
    configs, flags = split_config(argv)
    files = [find_recipe(c) for c in configs]
    return layered(default, files, flags, PROG, FinetuneConfig.__doc__ or "", FinetuneConfig)


def first_options(argv: list[str]) -> FinetuneConfig:
    """Options with the defaults that do not depend on the encoder.

    Raises:
        UserError: a mistake in them.
    """
    try:
        return read_options(argv, FinetuneConfig())
    except UserError as error:
        raise UserError(str(error).replace("--encoder.", "--scratch.")) from None
