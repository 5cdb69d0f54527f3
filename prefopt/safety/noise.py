"""Command lines leave out lines of other libraries that are of no use to the user.

Your own script that imports prefopt prints them all. Imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator


def quiet_warnings() -> None:
    """Leave out messages between libraries, such as PEFT's use of a name that transformers will remove."""
    warnings.filterwarnings("ignore", message=r".*is deprecated and will be removed in v6.*", category=FutureWarning)


def quiet_libraries() -> None:
    """Keep the screen for what a person needs, and print no message of a library twice."""
    quiet_warnings()
    if not os.environ.get("PREFOPT_VERBOSE"):
        from datasets.utils.logging import disable_progress_bar
        from transformers.utils import logging as transformers_logging

        disable_progress_bar()
        transformers_logging.disable_progress_bar()
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    for library in ("datasets", "huggingface_hub", "transformers"):
        # Each has its own handler besides the root's. transformers passes its lines on if CI is set, and prints
        # them itself elsewhere.
        logging.getLogger(library).handlers.clear()
        logging.getLogger(library).propagate = True
    logging.getLogger("DeepSpeed").addFilter(_says_more_than_cpu)


def _says_more_than_cpu(record: logging.LogRecord) -> bool:
    """False for DeepSpeed's warning that it did not find a GPU: a run prints its device."""
    return not record.getMessage().startswith("Setting accelerator to CPU.")


class _Lines(logging.Formatter):
    """Level and message, and of other libraries' messages whose they are."""

    def format(self, record: logging.LogRecord) -> str:
        whose = "" if record.name.partition(".")[0] == "prefopt" else f" {record.name}"
        return f"{record.levelname}{whose}: {super().format(record)}"


@contextlib.contextmanager
def errors_told_by_us(library: str) -> Iterator[None]:
    """Inside, a library logs no errors: our message replaces what it raises."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
