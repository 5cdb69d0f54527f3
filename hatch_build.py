"""Adds configs and recipes to the wheel, where `prefopt.safety.shipped` looks them up.

A table of pyproject.toml would copy them into editable installs too, which read the checkout's own.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Shipped(BuildHookInterface):  # type: ignore[type-arg, misc]
    """The hook that pyproject.toml names."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is built; `version` is "standard" or "editable"."""
        if version == "standard":
            build_data["force_include"] |= {folder: f"prefopt/shipped/{folder}" for folder in ("configs", "recipes")}
