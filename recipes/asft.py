"""ASFT in two stages: likelihood first, then the alignment term alone (arXiv 2409.10571, 2502.01237).

    accelerate launch recipes/asft.py --demo --loss "sft(nll='token')" --output_dir runs/sft
    accelerate launch recipes/asft.py --demo --model_name_or_path runs/sft --output_dir runs/asft
    accelerate launch recipes/asft.py --loss "asft_paper(lam=0.1)"         # the one stage of the first paper
    accelerate launch recipes/asft.py --config configs/papers/asft_two_stage.yaml --dry_run

runs/sft may hold a whole model or an adapter; an adapter is trained on.
Options are those of recipes/dpo.py.
"""

from prefopt.recipe import main

LOSS = "asft(beta=0.5)"

if __name__ == "__main__":
    main(LOSS)
