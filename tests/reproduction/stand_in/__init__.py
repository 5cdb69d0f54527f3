"""A package of experiments that take no time."""
