"""Cringe: likelihood on good completions, a token contrast on bad ones; no reference (arXiv 2211.05826, 2312.16682).

    accelerate launch recipes/cringe.py                                    # the bundled model and pairs
    accelerate launch recipes/cringe.py --dataset_name labelled.jsonl      # rows of prompt, completion, label
    accelerate launch recipes/cringe.py --loss "pairwise_cringe(margin=10, temperature=10)"
    accelerate launch recipes/cringe.py --config configs/papers/pairwise_cringe.yaml --demo

The pairwise form needs pairs and leaves those alone that the model already tells apart.
Options are those of recipes/dpo.py.
"""

from prefopt.recipe import main

LOSS = "cringe(k=5, weight=1.0)"

if __name__ == "__main__":
    main(LOSS)
