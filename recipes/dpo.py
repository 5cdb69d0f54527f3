"""Train a model on preferences.

    accelerate launch recipes/dpo.py                        # the bundled model and pairs, a few minutes on a CPU
    accelerate launch recipes/dpo.py --loss "ipo(beta=0.1)"
    accelerate launch recipes/dpo.py --config configs/dpo.yaml --dataset_name pairs.jsonl
    accelerate launch recipes/dpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset_name trl-lib/ultrafeedback_binarized --use_peft --learning_rate 5e-6

Add --dry_run to see the checked data, one decoded batch, the steps and the memory first, --demo to run a config's loss
on the bundled model and pairs. --help lists every option.
"""

from prefopt.recipe import dry_run, load_data, make_trainer, parse_arguments, run

LOSS = "dpo(beta=0.1)"


def main() -> None:
    recipe = parse_arguments(LOSS)
    if recipe.script.dry_run:
        dry_run(recipe)
        return
    train, heldout = load_data(recipe)
    trainer = make_trainer(recipe, train, heldout)
    run(recipe, trainer)


if __name__ == "__main__":
    main()
