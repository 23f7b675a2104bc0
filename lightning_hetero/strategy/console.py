"""Shows what the package says during a run, where nothing else shows it.

Lightning does the same for its own messages: a program that configures no logging still sees them. Here they say why a
plan uses one device, that the model is being measured, or that a batch is not cut.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

from lightning_utilities.core.rank_zero import rank_zero_only

NAME = "lightning_hetero"


class Console(logging.Handler):
    """Writes to stderr what process 0 says, and what others warn of, unless the program has handlers of its own."""

    def filter(self, record: logging.LogRecord) -> Any:
        """Whether nobody else shows the record, and it is for the reader of this process."""
        if logging.getLogger().handlers or any(other is not self for other in logging.getLogger(NAME).handlers):
            return False
        if record.levelno < logging.WARNING and getattr(rank_zero_only, "rank", None):
            return False
        return super().filter(record)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message, in lines of its own even where a progress bar is in the middle of one."""
        stream: TextIO = sys.stderr  # of now: notebooks and tests replace it
        bars: Any = sys.modules.get("tqdm")
        try:
            if bars is None:
                stream.write(f"{self.format(record)}\n")
            else:  # takes its bars away for a moment; without bars it only writes
                bars.tqdm.write(self.format(record), file=stream)
            stream.flush()
        except Exception:
            self.handleError(record)


def show_messages() -> None:
    """Attach the console to the logger of the package, once, and let it say what is INFO.

    A level that the program has set stays; so does that of the root logger where the program has configured it.
    """
    logger = logging.getLogger(NAME)
    if any(isinstance(handler, Console) for handler in logger.handlers):
        return
    handler = Console()
    handler.setFormatter(logging.Formatter("hetero: %(message)s"))
    logger.addHandler(handler)
    if (
        not logging.getLogger().handlers
        and logger.level == logging.NOTSET
        and logger.getEffectiveLevel() > logging.INFO
    ):
        logger.setLevel(logging.INFO)
