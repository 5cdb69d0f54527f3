"""Make a model forget: learn, forget, measure. Copy this file and change it: every step is here.

    accelerate launch recipes/unlearn.py --demo             # fictitious authors, about eight minutes on two CPU cores
    accelerate launch recipes/unlearn.py --demo --loss "ga + sft"
    accelerate launch recipes/unlearn.py --model_name_or_path MODEL_THAT_KNOWS --gold_model_name_or_path GOLD \\
        --forget_set locuslab/TOFU:forget10 --retain_set locuslab/TOFU:retain90 \\
        --forget_eval_set locuslab/TOFU:forget10_perturbed --retain_eval_set locuslab/TOFU:retain_perturbed \\
        --real_authors_set locuslab/TOFU:real_authors_perturbed --world_facts_set locuslab/TOFU:world_facts_perturbed

The gold model was trained without the forget set: forget quality compares with it. With --learn the model first learns
both sets, and the gold model is made as well. --dry_run shows settings, sets and steps; --help lists every option.
"""

from prefopt.recipe import parse_arguments, preflight
from prefopt.recipe.unlearning import (
    UnlearningArguments,
    dry_run,
    learned_models,
    load_sets,
    make_trainer,
    measure_first,
    run,
)

LOSS = "npo_rt(beta=0.2, retain=4)"  # the NPO paper: beta=0.1, and retain=1, 5 or 12 by the size of the forget set


def main() -> None:
    recipe = parse_arguments(LOSS, options=UnlearningArguments)
    if recipe.script.dry_run:
        dry_run(recipe)
        return

    ready = preflight(recipe)  # the model's name, limits and tokenizer
    questions = load_sets(recipe)  # what to forget, what to keep, what to measure with

    # With --learn: the model that knows both sets, and the gold model, which never saw the forget set.
    models = learned_models(recipe, ready, questions)
    measurements = measure_first(recipe, ready, questions, models)  # of both, once

    # A PreferenceTrainer with the loss; its evaluations measure what was forgotten and what was kept.
    trainer = make_trainer(recipe, ready, questions, models, measurements)

    # Forget, save the model with its card and results.json, show the table and some answers.
    run(recipe, trainer, questions, measurements)


if __name__ == "__main__":
    main()
