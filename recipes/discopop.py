"""DiscoPOP: a loss that a language model found, DPO's blended with the exponential one (arXiv 2406.08414).

    accelerate launch recipes/discopop.py                                  # the bundled model and pairs
    accelerate launch recipes/discopop.py --loss "dbaql(beta=0.05)"        # or aql, aqfl, padll, cell, pfl
    accelerate launch recipes/discopop.py --config configs/papers/discopop.yaml --demo

The loss is not convex: pairs that are slightly wrong are pushed to stay so.
Options are those of recipes/dpo.py.
"""

from prefopt.recipe import main

LOSS = "discopop(beta=0.05, tau=0.05)"

if __name__ == "__main__":
    main(LOSS)
