"""H-DPO: DPO with the policy's entropy under control (arXiv 2411.07595).

    accelerate launch recipes/hdpo.py                                      # the bundled model and pairs
    accelerate launch recipes/hdpo.py --loss "hdpo(beta=0.1, alpha=1.2)"   # alpha above 1 keeps the policy diverse
    accelerate launch recipes/hdpo.py --config configs/papers/hdpo.yaml --demo

The loss does not start at log 2 unless alpha is 1.
Options are those of recipes/dpo.py.
"""

from prefopt.recipe import main

LOSS = "hdpo(beta=0.1, alpha=0.9)"

if __name__ == "__main__":
    main(LOSS)
