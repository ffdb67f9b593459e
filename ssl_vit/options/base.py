"""Options of methods, and what they share with the parts that methods are made of.

Nothing in this folder imports torch, which takes longer than all else that ``--help``, a mistake or
a report needs: ``options/<name>.py`` has the options of ``methods/<name>.py``, its name for people
(``TITLE``) and what its scalars mean (``EXPLAINED``). A method that has all this in its own file
works as well, but for that.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

# The paper's values for shared options, as {"optim": {"betas": (0.9, 0.95)}}.
Defaults = dict[str, dict[str, Any]]
# What masked patches are predicted as; auto: as a run or file states.
Target = Literal["auto", "pixels", "normalized"]
# How a teacher's outputs become targets.
Kind = Literal["centering", "sinkhorn"]


class MethodConfig:
    """Base of a method's options, a frozen dataclass with the paper's values as defaults."""

    prefix: ClassVar[str] = "method"
