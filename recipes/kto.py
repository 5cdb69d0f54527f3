"""KTO: single completions that are good or bad, no pairs needed (arXiv 2402.01306).

    accelerate launch recipes/kto.py                                       # the bundled pairs, as single completions
    accelerate launch recipes/kto.py --dataset_name labelled.jsonl         # rows of prompt, completion, label
    accelerate launch recipes/kto.py --loss "bco(beta=0.1)"
    accelerate launch recipes/kto.py --config configs/papers/kto.yaml --demo

A batch needs at least two rows on each process.
Options are those of recipes/dpo.py.
"""

from prefopt.recipe import main

LOSS = "kto(beta=0.1)"

if __name__ == "__main__":
    main(LOSS)
