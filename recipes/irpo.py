"""Iterative reasoning preference optimization, one iteration: DPO and the winner's likelihood (arXiv 2404.19733).

    accelerate launch recipes/irpo.py                                      # the bundled model and pairs
    accelerate launch recipes/irpo.py --model_name_or_path runs/iteration1 --dataset_name pairs_of_iteration1.jsonl
    accelerate launch recipes/irpo.py --config configs/papers/irpo_gsm8k.yaml --demo

Start every iteration from the model that drew its pairs: the reference is that model too.
Options are those of recipes/dpo.py.
"""

from prefopt.recipe import main

LOSS = "irpo(beta=0.1, alpha=1.0)"

if __name__ == "__main__":
    main(LOSS)
