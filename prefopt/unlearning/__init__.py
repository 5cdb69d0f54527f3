"""Unlearning: forget and retain sets, and how forgetting and what is left of a model are measured.

`prefopt.unlearning.metrics` has the definitions, which need neither a model nor a trainer. This file imports nothing,
so that they can be used without transformers and TRL.
"""
