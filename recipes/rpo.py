"""Regularized preference optimization: DPO and the chosen completion's summed likelihood (arXiv 2405.16436).

    accelerate launch recipes/rpo.py                                       # the bundled model and pairs
    accelerate launch recipes/rpo.py --loss "dpo(beta=0.5) + 0.2*sft(nll='token')"   # the paper's average form
    accelerate launch recipes/rpo.py --config configs/papers/rpo_zephyr.yaml --demo

Options are those of recipes/dpo.py.
"""

from prefopt.recipe import main

LOSS = "rpo(beta=0.1, eta=0.005)"

if __name__ == "__main__":
    main(LOSS)
