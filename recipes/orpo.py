"""ORPO in two stages: likelihood first, then the odds-ratio term alone (arXiv 2403.07691, 2502.01237).

    accelerate launch recipes/orpo.py --demo --loss "sft(nll='token')" --output_dir runs/sft
    accelerate launch recipes/orpo.py --demo --model_name_or_path runs/sft --output_dir runs/orpo
    accelerate launch recipes/orpo.py --loss "orpo_paper(lam=0.1)"         # the one stage of the first paper
    accelerate launch recipes/orpo.py --config configs/papers/orpo_two_stage.yaml --dry_run

runs/sft may hold a whole model or an adapter; an adapter is trained on.
Options are those of recipes/dpo.py.
"""

from prefopt.recipe import main

LOSS = "orpo(beta=0.5)"

if __name__ == "__main__":
    main(LOSS)
