"""Identity preference optimization: a margin to reach instead of one to grow (arXiv 2310.12036).

    accelerate launch recipes/ipo.py                                       # the bundled model and pairs
    accelerate launch recipes/ipo.py --loss "ipo(beta=0.5)"                # the margin is 1 / (2 beta), per token
    accelerate launch recipes/ipo.py --config configs/papers/ipo_zephyr.yaml --dry_run

Options are those of recipes/dpo.py.
"""

from prefopt.recipe import main

LOSS = "ipo(beta=0.1)"

if __name__ == "__main__":
    main(LOSS)
