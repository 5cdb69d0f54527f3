"""From a paper to a verdict: what it claims, what a small experiment here measures, and how to run it in full.

A paper is a YAML file in `papers/`; what it claims is data. The experiments that measure it train with the shipped
losses. May import every room but `cli`; prints nothing.
"""

from __future__ import annotations

from prefopt.reproduction.paper import Paper, read_papers
from prefopt.reproduction.run import Result, reproduce

__all__ = ["Paper", "Result", "read_papers", "reproduce"]
