"""Modules of the `unlearning` extra, imported by the functions that need them."""

from __future__ import annotations

import importlib
from typing import Any

from prefopt.safety.errors import UsageError


def required(module: str, package: str, purpose: str) -> Any:
    """A module of the `unlearning` extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"{purpose} needs {package} ({error}): pip install 'prefopt-trainer[unlearning]'") from error
