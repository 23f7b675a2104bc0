"""Keeps the chatter of exporters from the user: warnings and log lines about their own inner life."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_TALKERS = ("", "torch.onnx")  # OpenVINO's converter writes to the root logger


@contextmanager
def without_chatter() -> Iterator[None]:
    """Drop warnings, and log lines below errors. Not for several threads at once."""
    loggers = [(logger, logger.level) for logger in map(logging.getLogger, _TALKERS)]
    for logger, _ in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers:
            logger.setLevel(level)
