"""NPO: unlearning, where rejected completions are to be forgotten and chosen ones kept (arXiv 2404.05868).

    accelerate launch recipes/npo.py                                       # forgets the bundled rejected answers
    accelerate launch recipes/npo.py --dataset_name unlearn.jsonl          # prompt, completion, label: false forgets
    accelerate launch recipes/npo.py --loss "npo_kl(beta=0.1)"             # or gradient_difference, simnpo_rt, undial
    accelerate launch recipes/npo.py --config configs/papers/npo_tofu_1b.yaml --demo

The reference is the model before unlearning.
Options are those of recipes/dpo.py.
"""

from prefopt.recipe import main

LOSS = "npo_rt(beta=0.1)"

if __name__ == "__main__":
    main(LOSS)
