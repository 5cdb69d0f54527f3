"""HyPO: DPO on given pairs, a reverse KL on completions drawn while training (arXiv 2406.01462).

    accelerate launch recipes/hypo.py --sample_max_new_tokens 32           # the bundled model and pairs
    accelerate launch recipes/hypo.py --loss "dpo(beta=0.1) + 0.1*kl_online" --sample_max_new_tokens 32
    accelerate launch recipes/hypo.py --config configs/papers/hypo_tldr.yaml --demo

lam must be compared with beta: far below it the KL cannot undo what DPO does outside the data.
Options are those of recipes/dpo.py.
"""

from prefopt.recipe import main

LOSS = "hypo(beta=0.1, lam=0.01)"

if __name__ == "__main__":
    main(LOSS)
