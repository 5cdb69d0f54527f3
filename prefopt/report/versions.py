"""Versions of installed packages, for cards, trackers and the Hub."""

from __future__ import annotations

from importlib import metadata


def version_of(package: str) -> str:
    """The version of an installed package; "unknown" if its metadata is missing, as for a checkout on the path."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
