"""`prefopt unlearn`: make a model forget, and measure what it forgot."""

from __future__ import annotations

from typing import Annotated

import typer

from prefopt.cli.app import app, console
from prefopt.cli.runs import PASSED_ON

unlearn = typer.Typer(help="Make a model forget a set, and measure what it forgot.", no_args_is_help=True)
app.add_typer(unlearn, name="unlearn")


@unlearn.command(context_settings=PASSED_ON, options_metavar="[OPTIONS; --help lists them]")
def run(context: typer.Context) -> None:
    """Learn, forget, measure: --demo, or --model_name_or_path, --forget_set, --retain_set, --loss ..."""
    from prefopt.recipe.unlearning import main

    main(argv=context.args)


_STORED = "; as the run stored it, if left out"


@unlearn.command()
def audit(
    model: Annotated[
        str, typer.Argument(help="The folder of a run of recipes/unlearn.py, or an unlearned model.", metavar="RUN")
    ],
    attacks: Annotated[
        str, typer.Option(help="Which attacks, with commas between them.")
    ] = "relearning,quantization,sampling,wording",
    gold_model_name_or_path: Annotated[
        str | None, typer.Option(help=f"The model trained without the forget set{_STORED}.")
    ] = None,
    start_model_name_or_path: Annotated[
        str | None, typer.Option(help=f"The model before forgetting{_STORED}.")
    ] = None,
    forget_set: Annotated[str | None, typer.Option(help=f"What was forgotten{_STORED}.")] = None,
    retain_set: Annotated[str | None, typer.Option(help="What was to be kept.")] = None,
    forget_eval_set: Annotated[
        str | None, typer.Option(help="The forget set with perturbed answers and paraphrased questions.")
    ] = None,
    retain_eval_set: Annotated[str | None, typer.Option(help="The same of the retain set.")] = None,
    real_authors_set: Annotated[str | None, typer.Option(help="For the model's utility.")] = None,
    world_facts_set: Annotated[str | None, typer.Option(help="For the model's utility.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="sampling: answers drawn to each question.")] = 16,
    relearn_steps: Annotated[int, typer.Option(min=1, help="relearning: optimizer steps.")] = 8,
    relearn_share: Annotated[
        float, typer.Option(help="relearning: part of the forget set to train on; the rest is asked.")
    ] = 0.25,
    relearn_learning_rate: Annotated[
        float | None, typer.Option(help="relearning: learning rate; that of learning, if left out.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 64,
    max_length: Annotated[
        int | None, typer.Option(min=2, help=f"Plain texts are cut into parts of this many tokens{_STORED}, or 1024.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16, float16.")] = None,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    output_dir: Annotated[
        str | None, typer.Option(help="Where audit.json goes; the folder of the run, if left out.")
    ] = None,
) -> None:
    """What a high forget quality hides: attack a model that has forgotten, and its gold model."""
    from prefopt.recipe.unlearning.audit import AuditOptions, main

    sets = {
        "forget_set": forget_set, "retain_set": retain_set, "forget_eval_set": forget_eval_set,
        "retain_eval_set": retain_eval_set, "real_authors_set": real_authors_set, "world_facts_set": world_facts_set,
    }  # fmt: skip
    options = AuditOptions(
        model,
        gold=gold_model_name_or_path,
        start=start_model_name_or_path,
        sets={name: value for name, value in sets.items() if value is not None},
        output_dir=output_dir,
        attacks=tuple(name.strip() for name in attacks.split(",") if name.strip()),
        samples=samples,
        relearn_steps=relearn_steps,
        relearn_share=relearn_share,
        relearn_learning_rate=relearn_learning_rate,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        dtype=dtype,
        seed=seed,
    )
    main(options, console())
