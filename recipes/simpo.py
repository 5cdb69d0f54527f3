"""SimPO: a margin between likelihoods per token, without a reference (arXiv 2405.14734).

    accelerate launch recipes/simpo.py                                     # the bundled model and pairs
    accelerate launch recipes/simpo.py --loss "alpha_po(beta=2.5, gamma=0.25, alpha=0.25)"
    accelerate launch recipes/simpo.py --config configs/papers/simpo_gemma2.yaml --demo

Options are those of recipes/dpo.py.
"""

from prefopt.recipe import main

LOSS = "simpo(beta=2.0, gamma=1.0)"

if __name__ == "__main__":
    main(LOSS)
