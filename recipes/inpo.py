"""INPO, one iteration: towards the Nash policy of a preference judge (arXiv 2407.00617).

    accelerate launch recipes/inpo.py                                      # the bundled model and pairs: iteration 1
    accelerate launch recipes/inpo.py --model_name_or_path runs/inpo1 --previous_model_name_or_path runs/inpo1 \\
        --ref_model_name_or_path the/sft-model --dataset_name pairs_drawn_from_inpo1.jsonl --output_dir runs/inpo2
    accelerate launch recipes/inpo.py --config configs/papers/inpo_comal.yaml --demo

In the first iteration reference, previous iterate and start are one model. Pairs are drawn from the previous iterate.
Options are those of recipes/dpo.py.
"""

from prefopt.recipe import main

LOSS = "inpo(eta=0.0075, tau=0.0025)"

if __name__ == "__main__":
    main(LOSS)
