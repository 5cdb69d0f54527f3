"""What a `trl.DPOTrainer` user relies on besides the loss, kept by `PreferenceTrainer`: how models and data may be
given, references, evaluation, adapters, images, checkpoints. Runs are two steps of a tiny model; each test asserts
weights that moved or stayed, or numbers that must agree.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorWithPadding, TrainerCallback, default_data_collator
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.safety.errors import UsageError
from prefopt.scoring.rows import RowBatch
from tests.tiny import CHATML, make_model, make_tokenizer, make_vlm
from tests.trainer.runs import save_model, settings

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "bridges", "carry", "loads", "home")


def phrase(i: int, length: int) -> str:
    return " ".join(WORDS[(i * 5 + j * 3) % len(WORDS)] for j in range(length))


def plain_pairs(n: int = 8) -> Dataset:
    # The first letters of both completions differ, so that an implicit prompt ends where the explicit one does.
    rows = [
        {"prompt": phrase(i, 3), "chosen": f" Yes {phrase(i + 1, 2)}", "rejected": f" No {phrase(i + 2, 4)}"}
        for i in range(n)
    ]
    return Dataset.from_list(rows)


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def chat_pairs(n: int = 8) -> Dataset:
    def converted(row: dict[str, str]) -> dict[str, Any]:
        return {
            "prompt": message("user", row["prompt"]),
            "chosen": message("assistant", row["chosen"].strip()),
            "rejected": message("assistant", row["rejected"].strip()),
        }

    return Dataset.from_list([converted(row) for row in plain_pairs(n)])


def implicit(pairs: Dataset) -> Dataset:
    def joined(row: dict[str, Any]) -> dict[str, Any]:
        return {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}

    return Dataset.from_list([joined(row) for row in pairs])


FORMATS = {
    "plain": plain_pairs,
    "plain, implicit prompt": lambda: implicit(plain_pairs()),
    "chat": chat_pairs,
    "chat, implicit prompt": lambda: implicit(chat_pairs()),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def saved_moe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("moe"), "moe")


@pytest.fixture(scope="module", params=["llava", "gemma3"])
def saved_vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    for part in make_vlm(request.param):
        part.save_pretrained(folder)
    return str(folder)


def build(folder: Path, model: Any, train_dataset: Any = None, *, arguments: Any = None, **options: Any) -> Any:
    """A trainer for two steps with a large learning rate; `options` are the config's, `arguments` the trainer's."""
    options = {"max_steps": 2, "learning_rate": 0.05, "per_device_eval_batch_size": 2, **options}
    return PreferenceTrainer(
        model=model,
        args=PreferenceConfig(**settings(folder, **options)),
        train_dataset=plain_pairs() if train_dataset is None else train_dataset,
        **(arguments or {}),
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before: dict[str, torch.Tensor], model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(trainer: Any) -> set[str]:
    """Train, require a finite loss, and return the names of the weights that changed."""
    before = weights(trainer.model)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    return moved(before, trainer.model)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


# ---- how the model is given -----------------------------------------------------------------------------------------


def test_model_as_path_and_as_instance_train_alike(tmp_path: Path, saved: str) -> None:
    runs = {}
    for form, model in {"path": saved, "instance": AutoModelForCausalLM.from_pretrained(saved)}.items():
        trainer = build(tmp_path, model, arguments={"processing_class": make_tokenizer()})
        assert train(trainer) == set(weights(trainer.model))
        assert not moved(weights(AutoModelForCausalLM.from_pretrained(saved)), trainer.ref_model)
        runs[form] = losses(trainer)
    assert runs["path"] == pytest.approx(runs["instance"], abs=1e-6)
    assert runs["path"][0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("form", ["peft_config", "PeftModel"])
def test_adapters_train_and_the_base_stays(tmp_path: Path, saved: str, form: str) -> None:
    if form == "peft_config":
        trainer = build(tmp_path, saved, arguments={"peft_config": lora()})
    else:
        trainer = build(tmp_path, get_peft_model(AutoModelForCausalLM.from_pretrained(saved), lora()))
    assert trainer.ref_model is None
    expected = {name for name in weights(trainer.model) if "lora_" in name and ".ref." not in name}
    assert train(trainer) == expected
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_without_arguments_trl_defaults_apply(tmp_path: Path, saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Where TRL makes the config itself, it asks for bfloat16, which transformers refuses without a GPU or `use_cpu`.
    post_init = DPOConfig.__post_init__

    def on_cpu(self: Any) -> None:
        self.use_cpu = True
        post_init(self)

    monkeypatch.setattr(DPOConfig, "__post_init__", on_cpu)
    trainer = PreferenceTrainer(saved, train_dataset=plain_pairs())
    assert {"trl", "dpo", "prefopt"} <= set(trainer.model.model_tags)
    assert str(trainer.objective).startswith("dpo(beta=0.1")


def test_bfloat16_weights_stay_bfloat16(tmp_path: Path, saved: str) -> None:
    trainer = build(tmp_path, saved, model_init_kwargs={"dtype": torch.bfloat16})
    changed = train(trainer)
    assert changed >= {name for name in weights(trainer.model) if "norm" not in name}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}
    assert trainer.ref_model.dtype == torch.bfloat16
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-2)


# ---- how the data are given -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_formats(tmp_path: Path, saved: str, form: str) -> None:
    trainer = build(tmp_path, saved, FORMATS[form]())
    explicit = FORMATS[form.partition(",")[0]]()
    same = build(tmp_path, saved, explicit)
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert trainer.train_dataset.select_columns(columns)[:] == same.train_dataset.select_columns(columns)[:]
    assert train(trainer) == set(weights(trainer.model))


def test_streams_train_and_evaluate_like_tables(tmp_path: Path, saved: str) -> None:
    table = plain_pairs()
    trainer = build(
        tmp_path,
        saved,
        table.to_iterable_dataset(),
        arguments={"eval_dataset": table.to_iterable_dataset()},
        eval_strategy="steps",
        eval_steps=1,
    )
    assert train(trainer) == set(weights(trainer.model))
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2
    assert trainer.evaluate(table)["eval_loss"] == pytest.approx(evaluated[-1], rel=1e-5)


def test_rows_whose_prompt_fills_max_length_are_dropped(tmp_path: Path, saved: str) -> None:
    rows = [plain_pairs(1)[0], {"prompt": phrase(0, 40), "chosen": " Yes", "rejected": " No"}]
    trainer = build(tmp_path, saved, Dataset.from_list(rows), max_length=30)
    assert trainer.train_dataset["prompt"] == [rows[0]["prompt"]]
    trainer = build(tmp_path, saved, Dataset.from_list(rows), max_length=None)
    assert len(trainer.train_dataset) == 2


def test_max_length_cuts_completions(tmp_path: Path, saved: str) -> None:
    pairs = plain_pairs()
    longest = max(len(ids) for ids in build(tmp_path, saved, pairs).train_dataset["prompt_ids"])
    trainer = build(tmp_path, saved, pairs, max_length=longest + 2)
    train(trainer)
    whole = build(tmp_path, saved, pairs, max_length=None)
    train(whole)
    cut, full = trainer.state.log_history[0], whole.state.log_history[0]
    assert 0 < cut["lengths/rejected"] < full["lengths/rejected"]


@pytest.mark.parametrize("columns", [{}, {"weight": [1.0, 2.0] * 4}])
def test_spawned_workers_can_load_rows_and_collator(tmp_path: Path, saved: str, columns: dict[str, Any]) -> None:
    """Where processes are spawned, as on macOS, a worker gets pickled copies."""
    pairs = plain_pairs()
    for name, values in columns.items():
        pairs = pairs.add_column(name, values)
    loader = build(tmp_path, saved, pairs, dataloader_num_workers=1).get_train_dataloader()
    rows, collator = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    batch, expected = collator([rows[0], rows[1]]), loader.collate_fn([loader.dataset[0], loader.dataset[1]])
    assert batch.keys() == expected.keys()
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    assert RowBatch.of(batch).columns.keys() == columns.keys()


def test_training_data_are_required(tmp_path: Path, saved: str) -> None:
    with pytest.raises((ValueError, TypeError), match="train_dataset"):
        PreferenceTrainer(saved, args=PreferenceConfig(**settings(tmp_path)))


def test_tools_reach_the_template(tmp_path: Path, saved: str) -> None:
    tool = {"type": "function", "function": {"name": "start_timer", "parameters": {"type": "object"}}}

    def calls(seconds: int) -> list[dict[str, Any]]:
        call = {"type": "function", "function": {"name": "start_timer", "arguments": {"duration": seconds}}}
        return [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": str(seconds)},
            {"role": "assistant", "content": f"Set for {seconds} seconds."},
        ]

    rows = [
        {
            "prompt": message("user", f"Wait {n} minutes"),
            "chosen": calls(60 * n),
            "rejected": calls(n),
            "tools": [tool],
        }
        for n in range(2, 6)
    ]
    trainer = build(tmp_path, saved, Dataset.from_list(rows), max_length=None)
    decode = trainer.processing_class.decode
    first = trainer.train_dataset[0]
    assert "start_timer" in decode(first["prompt_ids"])
    assert '"duration": 120' in decode(first["chosen_ids"])
    assert '"duration": 2}' in decode(first["rejected_ids"])
    assert train(trainer) == set(weights(trainer.model))


def test_template_arguments_of_each_row(tmp_path: Path, saved: str) -> None:
    tokenizer = make_tokenizer("{% if shout %}LOUD {% endif %}" + CHATML)
    pairs = chat_pairs().add_column("chat_template_kwargs", [{"shout": i % 2 == 1} for i in range(8)])
    trainer = build(tmp_path, saved, pairs, arguments={"processing_class": tokenizer})
    texts = [tokenizer.decode(ids) for ids in trainer.train_dataset["prompt_ids"]]
    assert [text.startswith("LOUD ") for text in texts] == [i % 2 == 1 for i in range(8)]
    assert train(trainer) == set(weights(trainer.model))


# ---- references -----------------------------------------------------------------------------------------------------


def test_given_reference_is_used_and_stays(tmp_path: Path, saved: str) -> None:
    reference = make_model(seed=3)
    before = weights(reference)
    trainer = build(tmp_path, saved, arguments={"ref_model": reference})
    assert train(trainer) == set(weights(trainer.model))
    assert not moved(before, trainer.ref_model)
    assert losses(trainer)[0] != pytest.approx(math.log(2), abs=1e-3)


def test_reference_follows_the_policy(tmp_path: Path, saved: str) -> None:
    trainer = build(tmp_path, saved, sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=2)
    before = weights(trainer.ref_model)
    train(trainer)
    assert moved(before, trainer.ref_model) == set(before)
    assert not moved(weights(trainer.model), trainer.ref_model)


def test_a_reference_moved_before_the_step_is_one_step_behind(tmp_path: Path, saved: str) -> None:
    """As Humanline has it: the last gradient was taken against the policy of the step before."""
    trainer = build(
        tmp_path, saved, loss="humanline(dpo(beta=0.1))", max_steps=3, sync_ref_model=True, sync_ref_before_step=True,
        ref_model_mixup_alpha=1.0, ref_model_sync_steps=1,
    )  # fmt: skip
    policies: list[dict[str, torch.Tensor]] = []

    class Snapshots(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            policies.append(weights(trainer.model))

    trainer.add_callback(Snapshots())
    train(trainer)
    assert not moved(policies[-2], trainer.ref_model)
    assert moved(policies[-1], trainer.ref_model)
    # Moved after the step, as TRL does, the reference would equal the policy at every step.
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert all(value != pytest.approx(math.log(2), abs=1e-3) for value in losses(trainer)[1:])


@pytest.mark.parametrize("adapter", [False, True])
def test_precomputed_reference_gives_the_same_losses(tmp_path: Path, saved: str, adapter: bool) -> None:
    history = []
    for precompute in (False, True):
        arguments = {"eval_dataset": {"a": plain_pairs(5)}, **({"peft_config": lora()} if adapter else {})}
        trainer = build(
            tmp_path,
            saved,
            arguments=arguments,
            precompute_ref_log_probs=precompute,
            eval_strategy="steps",
            eval_steps=1,
        )
        train(trainer)
        assert (trainer.ref_model is None) == (precompute or adapter)
        evaluated = [entry["eval_a_loss"] for entry in trainer.state.log_history if "eval_a_loss" in entry]
        history.append(losses(trainer) + evaluated)
    assert len(history[0]) == 4
    assert history[0] == pytest.approx(history[1], rel=1e-4)


@pytest.mark.parametrize("where", ["train", "eval", "eval dict"])
def test_precomputing_over_streams_is_refused(tmp_path: Path, saved: str, where: str) -> None:
    table, stream = plain_pairs(), plain_pairs().to_iterable_dataset()
    evaluation = {"train": None, "eval": stream, "eval dict": {"a": stream}}[where]
    with pytest.raises(ValueError, match="precompute_ref_log_probs"):
        build(
            tmp_path,
            saved,
            stream if where == "train" else table,
            arguments={"eval_dataset": evaluation},
            precompute_ref_log_probs=True,
        )


def test_precomputing_after_training_is_refused(tmp_path: Path, saved: str) -> None:
    trainer = build(tmp_path, saved, arguments={"eval_dataset": plain_pairs(4)}, precompute_ref_log_probs=True)
    known = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(plain_pairs(4))["eval_loss"] == pytest.approx(known, rel=1e-5)
    trainer.train()
    with pytest.raises(ValueError, match="reference"):
        trainer.evaluate(plain_pairs(4))
    assert trainer.evaluate()["eval_loss"] != pytest.approx(known, rel=1e-3)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_several_evaluation_sets_log_under_their_names(tmp_path: Path, saved: str) -> None:
    sets = {"a": plain_pairs(5), "b": plain_pairs(5), "c": chat_pairs(4)}
    trainer = build(tmp_path, saved, arguments={"eval_dataset": sets}, eval_strategy="steps", eval_steps=1)
    train(trainer)
    entries = {name: [e for e in trainer.state.log_history if f"eval_{name}_loss" in e] for name in sets}
    for name, logged in entries.items():
        assert len(logged) == 2
        assert f"eval_{name}_rewards/margins" in logged[0]
        assert math.isfinite(logged[0][f"eval_{name}_rewards/margins"])
    for a, b in zip(entries["a"], entries["b"], strict=True):
        for metric in ("loss", "rewards/margins", "logps/chosen"):
            assert a[f"eval_a_{metric}"] == pytest.approx(b[f"eval_b_{metric}"], rel=1e-6)
    assert entries["a"][1]["eval_a_loss"] != pytest.approx(entries["c"][1]["eval_c_loss"], rel=1e-3)


FRESH = {
    "Dataset": lambda data: data,
    "IterableDataset": lambda data: data.to_iterable_dataset(),
    "DatasetDict": lambda data: DatasetDict({"a": data, "b": data}),
    "IterableDatasetDict": lambda data: IterableDatasetDict({"a": data.to_iterable_dataset()}),
    "dict": lambda data: {"a": data},
    "dict of streams": lambda data: {"a": data.to_iterable_dataset()},
}


@pytest.mark.parametrize("form", FRESH)
def test_evaluating_data_the_trainer_has_not_seen(tmp_path: Path, saved: str, form: str) -> None:
    # A whole number of batches: transformers weighs a stream's last, smaller batch like the others.
    data = plain_pairs(4)
    trainer = build(tmp_path, saved, arguments={"eval_dataset": data, "ref_model": make_model(seed=3)})
    known = trainer.evaluate()
    metrics = trainer.evaluate(FRESH[form](data))
    prefix = "eval" if isinstance(FRESH[form](data), (Dataset, IterableDataset)) else "eval_a"
    assert metrics[f"{prefix}_loss"] == pytest.approx(known["eval_loss"], rel=1e-5)
    logged = trainer.state.log_history
    entry = next(e for e in reversed(logged) if f"{prefix}_rewards/margins" in e)
    assert entry[f"{prefix}_rewards/margins"] == pytest.approx(logged[0]["eval_rewards/margins"], rel=1e-4)


def test_compute_metrics_sees_logits_and_tokens(tmp_path: Path, saved: str) -> None:
    seen = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"mine": 0.25}

    data = plain_pairs(4)
    trainer = build(
        tmp_path,
        saved,
        arguments={"eval_dataset": data, "compute_metrics": compute_metrics},
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
    )
    train(trainer)
    assert any(entry.get("eval_mine") == 0.25 for entry in trainer.state.log_history)
    (prediction,) = seen
    rows, length, vocabulary = prediction.predictions.shape
    assert (rows, length) == prediction.label_ids.shape
    assert (rows, vocabulary) == (8, trainer.model.config.vocab_size)
    # They are the policy's own logits for the rows whose tokens come with them.
    ids = torch.tensor(prediction.label_ids)
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids, attention_mask=(ids != trainer.processing_class.pad_token_id))
    real = (ids != trainer.processing_class.pad_token_id).numpy()
    assert prediction.predictions[real] == pytest.approx(expected.logits.numpy()[real], abs=1e-4)


@pytest.mark.parametrize(
    ("collator", "message"),
    [
        (
            default_data_collator,
            "data_collator default_data_collator makes no batch of rows with the columns prompt_ids",
        ),
        (DataCollatorWithPadding(make_tokenizer()), "data_collator DataCollatorWithPadding makes no batch of rows"),
        (
            lambda rows: {"input_ids": torch.zeros(2, 3)},
            "batch has no attention_mask and no completion_mask, but input_ids",
        ),
        (lambda rows: {"prompt_ids": torch.zeros(2, 3)}, "batch has no input_ids and no attention_mask"),
    ],
)
def test_a_collator_for_other_data_is_explained(tmp_path: Path, saved: str, collator: Any, message: str) -> None:
    trainer = build(tmp_path, saved, arguments={"data_collator": collator})
    with pytest.raises(UsageError, match=message):
        trainer.train()


def test_trls_own_collator_gives_the_same_losses(tmp_path: Path, saved: str) -> None:
    ours = build(tmp_path / "ours", saved)
    theirs = build(tmp_path / "theirs", saved, arguments={"data_collator": DataCollatorForPreference(pad_token_id=0)})
    train(ours)
    train(theirs)
    assert losses(theirs) == pytest.approx(losses(ours), abs=1e-5)


def test_callbacks_see_every_log(tmp_path: Path, saved: str) -> None:
    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.logs: list[dict[str, float]] = []
            self.evaluations = 0

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **keywords: Any) -> None:
            self.logs.append(dict(logs))

        def on_evaluate(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            self.evaluations += 1

    recorder = Recorder()
    trainer = build(
        tmp_path,
        saved,
        arguments={"eval_dataset": plain_pairs(3), "callbacks": [recorder]},
        eval_strategy="steps",
        eval_steps=1,
    )
    train(trainer)
    steps = [entry for entry in recorder.logs if "loss" in entry]
    assert [entry["loss"] for entry in steps] == losses(trainer)
    assert all(math.isfinite(entry["rewards/margins"]) and math.isfinite(entry["grad_norm"]) for entry in steps)
    assert recorder.evaluations == 2


# ---- adapters, checkpointing, experts -------------------------------------------------------------------------------

PROMPT_LEARNING = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", PROMPT_LEARNING)
def test_prompt_learning(tmp_path: Path, saved: str, kind: str) -> None:
    # Virtual tokens change the policy before the first update, so the reference differs from the start.
    trainer = build(tmp_path, saved, arguments={"peft_config": PROMPT_LEARNING[kind]})
    changed = train(trainer)
    assert changed == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all("prompt_encoder" in name for name in changed)
    assert losses(trainer)[0] != pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("adapter", [False, True])
def test_gradient_checkpointing_changes_no_number(tmp_path: Path, saved: str, adapter: bool) -> None:
    arguments = {"peft_config": lora()} if adapter else {}
    runs = []
    for checkpointing in (False, True):
        trainer = build(tmp_path, saved, arguments=arguments, gradient_checkpointing=checkpointing)
        trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        assert train(trainer) == trainable
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_expert_balance_is_part_of_the_loss(tmp_path: Path, saved_moe: str) -> None:
    with_aux = build(tmp_path, saved_moe, router_aux_loss_coef=0.5)
    assert train(with_aux) == set(weights(with_aux.model))
    first = with_aux.state.log_history[0]
    assert first["aux_loss"] > 0
    assert first["loss"] == pytest.approx(math.log(2) + 0.5 * first["aux_loss"], rel=1e-4)
    without = build(tmp_path, saved_moe, router_aux_loss_coef=0.0)
    train(without)
    assert without.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert "aux_loss" not in without.state.log_history[0]


def test_last_entry_holds_what_no_step_logged(tmp_path: Path, saved_moe: str) -> None:
    trainer = build(tmp_path, saved_moe, max_steps=3, logging_steps=2)
    train(trainer)
    logged, final = trainer.state.log_history
    assert logged["step"] == 2
    for metric in ("aux_loss", "rewards/margins", "logps/chosen", "entropy"):
        assert math.isfinite(final[metric])
        assert final[metric] != logged[metric]
    assert final["num_tokens"] > logged["num_tokens"] > 0


# ---- images ---------------------------------------------------------------------------------------------------------


def image_pairs(n: int = 4, column: str = "images") -> Dataset:
    image = pytest.importorskip("PIL.Image")
    pictures = [image.new("RGB", (30 + 5 * i, 40), (60 * i, 250 - 60 * i, 128)) for i in range(n)]
    values = [[picture] for picture in pictures] if column == "images" else pictures
    return Dataset.from_dict({**chat_pairs(n).to_dict(), column: values})


def is_frozen_in_llava(name: str) -> bool:
    # LLaVA reads the last but one layer of its vision tower: what comes after has no gradient.
    return "encoder.layers.1" in name or "post_layernorm" in name


@pytest.mark.parametrize("column", ["images", "image"])
def test_image_pairs(tmp_path: Path, saved_vlm: str, column: str) -> None:
    trainer = build(tmp_path, saved_vlm, image_pairs(column=column), max_length=None)
    assert {"images", "image", "prompt"} & set(trainer.train_dataset.column_names)
    changed = train(trainer)
    reached = {n for n in weights(trainer.model) if not ("llava" in saved_vlm and is_frozen_in_llava(n))}
    assert any("vision" in name for name in reached)
    assert changed == reached
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_images_matter(tmp_path: Path, saved_vlm: str) -> None:
    data = image_pairs(2)
    other = Dataset.from_dict({**data.to_dict(), "images": data["images"][::-1]})
    found = []
    for pairs in (data, other):
        trainer = build(tmp_path, saved_vlm, image_pairs(), arguments={"eval_dataset": pairs}, max_length=None)
        trainer.evaluate()
        found.append(trainer.state.log_history[-1]["eval_logps/chosen"])
    assert found[0] != pytest.approx(found[1], abs=1e-4)


def test_images_with_an_adapter(tmp_path: Path, saved_vlm: str) -> None:
    trainer = build(tmp_path, saved_vlm, image_pairs(), arguments={"peft_config": lora()}, max_length=None)
    changed = train(trainer)
    assert changed
    assert all("lora_" in name for name in changed)


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_text_only_pairs_leave_the_vision_tower(tmp_path: Path, saved_vlm: str, form: str) -> None:
    trainer = build(tmp_path, saved_vlm, FORMATS[form]() if form == "plain" else chat_pairs())
    changed = train(trainer)
    text = {n for n in weights(trainer.model) if "vision" not in n and "projector" not in n}
    assert changed == text
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_cutting_image_tokens_is_explained(tmp_path: Path, saved_vlm: str) -> None:
    trainer = build(tmp_path, saved_vlm, image_pairs(), max_length=6)
    with pytest.raises(ValueError, match="max_length"):
        trainer.train()


REFUSED = {
    "keep_end": {"truncation_mode": "keep_end", "max_length": 32},
    "precompute_ref_log_probs": {"precompute_ref_log_probs": True},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("option", REFUSED)
def test_options_that_images_rule_out(tmp_path: Path, saved_vlm: str, option: str) -> None:
    with pytest.raises(ValueError, match=option):
        build(tmp_path, saved_vlm, image_pairs(), **REFUSED[option])


def test_images_need_a_model_that_sees(tmp_path: Path, saved: str) -> None:
    # The words that TRL's own test of its message looks for.
    with pytest.raises(ValueError, match=r"vision-related.*vision-language model"):
        build(tmp_path, saved, image_pairs())


# ---- what stays on disk ---------------------------------------------------------------------------------------------


def test_checkpoints_carry_a_model_card(tmp_path: Path, saved: str) -> None:
    trainer = build(tmp_path, saved, loss="ipo(beta=0.3)", save_strategy="steps", save_steps=2)
    train(trainer)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "model.safetensors").exists()
    card = (tmp_path / "run" / "README.md").read_text()
    for tag in ("trl", "ipo", "prefopt"):
        assert f"- {tag}\n" in card
    assert "- dpo\n" not in card
    assert str(trainer.objective) in card
    reloaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not moved(weights(trainer.model), reloaded)


@pytest.mark.parametrize("adapter", [False, True])
def test_resumed_run_ends_where_the_whole_one_does(tmp_path: Path, saved: str, adapter: bool) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    arguments = {"peft_config": lora()} if adapter else {}
    whole = build(tmp_path / "whole", saved, arguments=arguments, **options)
    whole.train()
    resumed = build(tmp_path / "resumed", saved, arguments=arguments, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    for name, parameter in resumed.model.named_parameters():
        assert torch.allclose(parameter, whole.model.get_parameter(name), atol=1e-6), name
