"""Versions of installed packages, for cards, trackers and the Hub."""

from __future__ import annotations

from importlib import metadata

_DISTRIBUTIONS = {"prefopt": "prefopt-trainer"}
"""Packages whose distribution has another name."""


def version_of(package: str) -> str:
    """The version of an installed package; "unknown" if its metadata is missing, as for a checkout on the path."""
    try:
        return metadata.version(_DISTRIBUTIONS.get(package, package))
    except metadata.PackageNotFoundError:
        return "unknown"
