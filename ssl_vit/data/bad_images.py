"""Bad images of a run: counted over all processes, named once, limited."""

from __future__ import annotations

import json
import logging

from ssl_vit.common.distributed import gather_texts
from ssl_vit.common.errors import UserError
from ssl_vit.data.batch import Batch
from ssl_vit.data.sources import Source

log = logging.getLogger("ssl_vit")


class BadImages:
    """Counts unreadable images, names each once, and stops the run when they are too many.

    Over all processes: each notes its own, and all count them together.
    """

    def __init__(self, source: Source, max_share: float) -> None:
        self.spec, self.n, self.max_share = source.spec, len(source), max_share
        self.found: set[int] = set()
        self.noted: dict[int, str] = {}
        self.empty: set[int] = set()
        self.noted_empty: set[int] = set()

    def note(self, batch: Batch) -> None:
        """Take in a batch's unreadable images and empty tiles; ``count`` counts those that are
        new."""
        self.noted |= {index: why for index, why in batch.bad.items() if index not in self.found}
        self.noted_empty |= batch.empty - self.empty

    @property
    def news(self) -> bool:
        """True if there is something to count: also if empty tiles are twice as many as before."""
        many = len(self.noted_empty) > len(self.empty)
        return bool(self.noted) or many

    def count(self) -> None:
        """Count and name what any process has noted. All must call it.

        Tiles without data are no fault of a file, and not limited: their number is reported.

        Raises:
            UserError: more than the allowed share of all images is unreadable.
        """
        reason = ""
        before = len(self.empty)
        for text in gather_texts(json.dumps([self.noted, sorted(self.noted_empty)])):
            noted, empty = json.loads(text)
            self.empty.update(empty)
            for index, reason in noted.items():
                if int(index) not in self.found:
                    self.found.add(int(index))
                    log.warning("unreadable image %d skipped: %s", len(self.found), reason)
        self.noted, self.noted_empty = {}, set()
        if len(self.empty) > before:
            text = "%s of %s images so far are tiles without data, replaced by others"
            log.info(text, f"{len(self.empty):,}", f"{self.n:,}")
        if len(self.found) > self.max_share * self.n:
            raise UserError(
                f"{len(self.found)} of {self.n} images of {self.spec} are unreadable, more than "
                f"--data.max-bad {self.max_share:g} allows; the last: {reason}",
                everywhere=True,
            )
