"""Train a model on preferences.

    accelerate launch recipes/dpo.py                        # the bundled model and pairs, a few minutes on a CPU
    accelerate launch recipes/dpo.py --loss "ipo(beta=0.1)"
    accelerate launch recipes/dpo.py --config configs/dpo.yaml --dataset_name pairs.jsonl
    accelerate launch recipes/dpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset_name trl-lib/ultrafeedback_binarized --use_peft --learning_rate 5e-6

Add --dry_run to see the checked data, one decoded batch, the steps and the memory first. --help lists every option.
"""

from prefopt.recipe import load_data, make_trainer, parse_arguments, run, show_plan


def main() -> None:
    recipe = parse_arguments(loss="dpo(beta=0.1)")
    train, heldout = load_data(recipe)
    if recipe.script.dry_run:
        show_plan(recipe.console, recipe.training, recipe.model, train)
        return
    trainer = make_trainer(recipe, train, heldout)
    run(recipe, trainer)


if __name__ == "__main__":
    main()
