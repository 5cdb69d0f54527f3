"""Train on a model's own samples, in rounds: sample, judge, pair, train, again. Copy this file and change it.

    accelerate launch recipes/irpo.py --demo                # arithmetic problems, half an hour on two CPU cores
    accelerate launch recipes/irpo.py --demo --loss dpo --output_dir runs/rounds_dpo    # without the likelihood term
    accelerate launch recipes/irpo.py --config configs/rounds/superhf_rounds.yaml
    accelerate launch recipes/irpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --prompts gsm8k_train.jsonl \\
        --heldout_prompts gsm8k_test.jsonl --judges number --pairs "round_robin(pairs=10)" --gold solution

A run that was stopped, or killed, continues with the same command. --dry_run shows each round's models, loss and
prompts; --help lists every option. docs/rounds.md explains the files.
"""

from prefopt.online.generators import generators_of
from prefopt.online.judging import judges_of
from prefopt.online.loop import Rounds
from prefopt.online.options import RoundsArguments
from prefopt.online.run import check_rounds, dry_run, load_prompts
from prefopt.recipe import parse_arguments, preflight

LOSS = "irpo(beta=0.1, alpha=1.0)"


def main() -> None:
    recipe = parse_arguments(LOSS, options=RoundsArguments)
    ready = preflight(recipe)  # the initial model's name, limits and tokenizer
    prompts = load_prompts(recipe)  # to sample from, and held-out ones to evaluate on
    check_rounds(recipe, ready, prompts)  # the models, loss and prompts of every round
    if recipe.script.dry_run:
        dry_run(recipe, ready, prompts)
        return

    judges = judges_of(recipe.script.judges or [])  # functions, checkable answers, models
    heldout_judges = judges_of(recipe.script.heldout_judges or []) or judges  # as SuperHF's second reward model
    generators = generators_of(recipe, ready)  # the policy draws, and leaves the memory before training; or a server

    # For each round: sample, judge, pair, train, evaluate. Stages that are done are not done again.
    Rounds(recipe, ready, prompts, judges, generators, heldout_judges).run()


if __name__ == "__main__":
    main()
