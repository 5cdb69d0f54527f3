"""Train a model on preferences. Copy this file and change it: every step is here.

    accelerate launch recipes/dpo.py                        # the bundled model and pairs, a few minutes on a CPU
    accelerate launch recipes/dpo.py --loss "ipo(beta=0.1)"
    accelerate launch recipes/dpo.py --config configs/dpo.yaml --dataset_name pairs.jsonl
    accelerate launch recipes/dpo.py --config configs/papers/simpo.yaml --demo
    accelerate launch recipes/dpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset_name trl-lib/ultrafeedback_binarized --use_peft --learning_rate 5e-6

Add --dry_run to see the checked data, one decoded batch, the steps and the memory first, --demo to run a config's loss
on the bundled model and pairs. --help lists every option.
"""

from trl import get_peft_config, get_quantization_config

from prefopt import PreferenceTrainer
from prefopt.recipe import dry_run, load_data, parse_arguments, preflight, run
from prefopt.recipe.build import card_notes, load_frozen, load_policy, show_progress, starting

LOSS = "dpo(beta=0.1)"


def main() -> None:
    # Options: the command line, over the --config file, over the defaults. --loss takes the place of LOSS.
    recipe = parse_arguments(LOSS)
    if recipe.script.dry_run:
        dry_run(recipe)
        return

    # The model's name, limits and tokenizer; then the rows, checked one by one. No weights are loaded yet.
    ready = preflight(recipe)
    data = load_data(recipe, ready)

    with starting(recipe, ready, data):  # says what is trained, and moves an earlier run out of the output folder
        whole = ready.adapter_of is None  # a saved adapter has its quantised model and its settings already
        trainer = PreferenceTrainer(
            load_policy(recipe, ready),
            ref_model=load_frozen(recipe.script.ref_model_name_or_path, ready),  # None: the policy before training
            previous_model=load_frozen(recipe.script.previous_model_name_or_path, ready),  # for losses such as inpo
            args=ready.training,  # a PreferenceConfig, which is TRL's DPOConfig with the loss
            train_dataset=data.train,
            eval_dataset=data.heldout,
            processing_class=ready.processing_class,
            quantization_config=get_quantization_config(recipe.model) if whole else None,
            peft_config=get_peft_config(recipe.model) if whole else None,
        )
    trainer.notes = card_notes(recipe, ready, data)  # for the model card
    show_progress(recipe, trainer)  # callbacks of your own: trainer.add_callback(...)

    # Evaluate, train, evaluate, save the model with its card and results.json, push where that is asked for.
    run(recipe, trainer)


if __name__ == "__main__":
    main()
