"""Objectives and papers as tables, curves and plots. Imports `prefopt.losses`; matplotlib only to draw."""

from prefopt.catalogue.tables import (
    FAMILIES,
    Facts,
    Family,
    data_of,
    facts,
    families,
    losses_table,
    objectives_table,
    presets_table,
    reference_of,
)

__all__ = [
    "FAMILIES",
    "Facts",
    "Family",
    "data_of",
    "facts",
    "families",
    "losses_table",
    "objectives_table",
    "presets_table",
    "reference_of",
]
