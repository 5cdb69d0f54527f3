"""The experiments: small trainings with the shipped losses, each a function that measures what some claims need.

A paper's file (`prefopt/reproduction/papers/`) names the function, for example `dpo.optimum`, and each of its outcomes
names the claim that it is about.
"""
