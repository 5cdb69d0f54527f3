"""What is said before a model is loaded: by a dry run and by a real run alike, and without writing anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.recipe import load_data, main, make_trainer, parse_arguments, preflight
from prefopt.trainer.saving import checkpoints
from tests.recipe.test_recipe import arguments, loaded, pairs_file
from tests.trainer.runs import make_labelled, make_pairs, save_model, settings


@pytest.fixture(autouse=True)
def _no_model(monkeypatch):
    """Loading a model fails the test: everything here is to be said before."""
    monkeypatch.setattr("prefopt.recipe.build.PreferenceTrainer", None)
    monkeypatch.setattr("prefopt.recipe.build.load_model", None)
    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", None)


def test_an_empty_name_is_not_the_bundled_model(tmp_path):
    with pytest.raises(OSError, match="no configuration can be loaded from ''"):
        preflight(parse_arguments("dpo", ["--model_name_or_path", "", "--output_dir", str(tmp_path)]))


def labelled_file(folder: Path) -> str:
    path = folder / "labelled.jsonl"
    path.write_text("\n".join(json.dumps(dict(row)) for row in make_labelled(30)))
    return str(path)


REFUSED = [
    (["--loss", "kto", "--per_device_train_batch_size", "1"], "per_device_train_batch_size must be at least 2"),
    (["--loss", "tdpo", "--precompute_ref_log_probs", "true"], "precompute_ref_log_probs keeps sums only"),
    (["--loss", "margin_dpo"], "needs a numeric column 'margin'"),
    (["--loss", "simpo", "--reference_cache", "auto"], "reference_cache='auto' would have no effect"),
    (["--reference_cache", "auto", "--sync_ref_model", "true"], "cannot be used with sync_ref_model=True"),
    (["--eval_rows", "0", "--eval_strategy", "steps"], "needs held-out rows"),
    (["--dataset_streaming", "--max_steps", "-1"], "the training data is a stream.*set max_steps"),
    (["--report_to", "swanlab"], "needs the package swanlab, which is not installed: pip install swanlab"),
    (["--push_to_hub", "true"], "push_to_hub: HF_HUB_OFFLINE"),
    (
        ["--use_peft", "--lora_target_modules", "query"],
        r"--lora_target_modules query: .* It has q_proj, k_proj, v_proj",
    ),
    (["--use_peft", "--lora_target_modules", "q_proj", "valproj"], "--lora_target_modules valproj: the model has no"),
    (["--use_peft", "--lora_target_modules", "q_proj,v_proj"], "Names are separated by spaces"),
    (["--use_peft", "--lora_modules_to_save", "embed"], r"--lora_modules_to_save embed: .* It has embed_tokens"),
    (
        ["--attn_implementation", "nonsense"],
        '--attn_implementation nonsense: Specified `attn_implementation="nonsense"',
    ),
    (["--lr_scheduler_type", "cosine_with_min_lr"], "--lr_scheduler_type cosine_with_min_lr: .*min_lr_rate"),
    (["--optim", "rmsprop", "--optim_args", "momentum"], "--optim rmsprop --optim_args momentum: "),
    (["--optim", "lomo"], "--optim lomo: .*pip install lomo-optim"),
    (["--fsdp", "full_shard"], "fsdp needs several processes"),
    (["--save_strategy", "best"], "save_strategy='best' needs a metric"),
    (["--save_strategy", "best", "--metric_for_best_model", "loss"], "there are none: set eval_strategy"),
    (["--save_strategy", "steps", "--save_steps", "0"], "save_steps must be above 0"),
    (["--sync_ref_before_step", "true"], "without --sync_ref_model true"),
    (["--sync_ref_model", "true", "--use_peft"], "sync_ref_model cannot be used with an adapter"),
    (["--sync_ref_model", "true", "--precompute_ref_log_probs", "true"], "leave one of them out"),
    (["--max_steps", "0"], "max_steps=0 does not mean no steps: transformers would train .* epochs"),
    (["--dataloader_drop_last", "true", "--per_device_train_batch_size", "64"], "leaves nothing of 24 examples"),
    (["--loss_type", "sigmod"], "no loss_type 'sigmod'. Did you mean 'sigmoid'"),
    (["--loss_type", "exo_pair"], "exo_pair needs label_smoothing above 0"),
    (["--loss_type", "apo_zero", "--f_divergence_type", "js_divergence"], "cannot be used with loss_type apo_zero"),
    (["--loss_type", "aot", "--use_weighting"], "use_weighting cannot be used with aot"),
    (["--resume_from_checkpoint", "nowhere"], "cannot resume from nowhere: there is no such folder"),
    (["--resume_from_checkpoint", "true"], "holds no checkpoint to resume from"),
]


@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(("more", "message"), REFUSED, ids=[" ".join(more) for more, _ in REFUSED])
def test_what_cannot_run_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, more, message, dry):
    monkeypatch.setattr("prefopt.trainer.checks.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((ValueError, RuntimeError, SystemExit), match=message):
        main("dpo", [*arguments(tmp_path, pairs_file(tmp_path)), *more, *dry])


@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("option", "package", "message"),
    [
        (
            ["--load_in_4bit"],
            "transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available",
            "--load_in_4bit: ",
        ),
        (
            ["--use_liger_kernel", "true"],
            "prefopt.trainer.checks.is_liger_kernel_available",
            "pip install liger-kernel",
        ),
    ],
)
def test_a_missing_package_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, option, package, message, dry):
    monkeypatch.setattr(package, lambda *_: False)
    with pytest.raises((ValueError, SystemExit), match=message):
        main("dpo", [*arguments(tmp_path, pairs_file(tmp_path)), *option, *dry])


@pytest.mark.parametrize(
    "more",
    [
        ["--use_peft", "--lora_target_modules", "q_proj"],
        ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"],
        ["--use_peft", "--lora_target_modules", r".*\.q_proj"],
        ["--use_peft", "--lora_target_modules", "all-linear", "--lora_modules_to_save", "embed_tokens"],
        ["--attn_implementation", "eager"],
        ["--optim", "rmsprop", "--optim_args", "momentum=0.9"],
        ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}'],
        [
            "--eval_strategy",
            "steps",
            "--eval_steps",
            "1",
            "--save_strategy",
            "best",
            "--metric_for_best_model",
            "loss",
        ],
        ["--save_strategy", "no", "--save_steps", "5"],
    ],
    ids=" ".join,
)
def test_what_can_run_passes_the_dry_run(tmp_path, capsys, more):
    main("dpo", [*arguments(tmp_path, pairs_file(tmp_path)), *more, "--dry_run"])
    assert "Dry run: nothing was trained." in capsys.readouterr().out


def test_one_target_module_is_a_name_not_a_pattern(tmp_path):
    words = ["--use_peft", "--lora_target_modules", "q_proj"]
    assert parse_arguments("dpo", arguments(tmp_path, "unused", *words)).model.lora_target_modules == ["q_proj"]


@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["run", "dry run"])
def test_a_checkpoint_of_another_loss_is_refused(tmp_path, monkeypatch, dry):
    run = {"loss": "dpo(beta=0.1, label_smoothing=0.0)"}
    (tmp_path / checkpoints.STATE).write_text(json.dumps({"run": run}))
    monkeypatch.setattr(checkpoints, "choose", lambda *_: (tmp_path, []))
    words = [*arguments(tmp_path, pairs_file(tmp_path)), "--resume_from_checkpoint", str(tmp_path), *dry]
    with pytest.raises(RuntimeError, match=r"trained with the loss dpo\(.*this run has ipo\("):
        main("ipo", words)
    monkeypatch.setattr("prefopt.recipe.make_trainer", lambda *_: None)
    monkeypatch.setattr("prefopt.recipe.run", lambda *_: {})
    main("dpo", words)  # the same loss goes on


@pytest.mark.parametrize(("warm", "said"), [(5, True), (2, False)])
def test_a_warm_up_that_never_ends_is_said(tmp_path, capsys, warm, said):
    words = ["--max_steps", "4", "--warmup_steps", str(warm), "--dry_run"]
    main("dpo", [*arguments(tmp_path, pairs_file(tmp_path)), *words])
    assert ("still warming up when training ends: 5 warm-up steps, 4 steps" in capsys.readouterr().out) is said


@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["run", "dry run"])
def test_labelled_rows_are_refused_for_a_pair_loss(tmp_path, dry):
    with pytest.raises(ValueError, match=r"compares two completions.*train set holds single labelled"):
        main("dpo", [*arguments(tmp_path, labelled_file(tmp_path)), *dry])


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({}, {"train_dataset": make_labelled(8)}, "train set holds single labelled"),
        ({}, {"train_dataset": make_pairs(8), "eval_dataset": make_labelled(8)}, "eval set holds single labelled"),
        ({"max_steps": -1}, {"train_dataset": make_pairs(8).to_iterable_dataset()}, "is a stream.*set max_steps"),
        ({"eval_strategy": "steps", "eval_steps": 1}, {"train_dataset": make_pairs(8)}, "pass eval_dataset"),
        ({"report_to": ["swanlab"]}, {"train_dataset": make_pairs(8)}, "pip install swanlab"),
        ({}, {"train_dataset": make_pairs(8).select([])}, "no rows"),
        ({"loss": "simpo"}, {"train_dataset": make_pairs(8), "ref_model": "m"}, "ref_model would have no effect"),
        ({}, {"train_dataset": make_pairs(8).add_column("images", [["a"]] * 8)}, "'images', but .* reads only text"),
    ],
)  # fmt: skip
def test_the_python_api_refuses_the_same(tmp_path, options, data, message):
    args = PreferenceConfig(**settings(tmp_path, **{"loss": "dpo", **options}))
    with pytest.raises(ValueError, match=message):
        PreferenceTrainer(save_model(tmp_path), args=args, **data)


def test_a_dry_run_with_rows_to_drop_writes_nothing(tmp_path, capsys):
    data = pairs_file(tmp_path, bad_3={"chosen": []})
    main("dpo", [*arguments(tmp_path, data), "--dry_run", "--on_bad_rows", "drop"])
    assert not (tmp_path / "out").exists()
    assert "1 training rows would be dropped" in capsys.readouterr().out


def test_the_batch_of_a_dry_run_is_padded_as_the_trainers(tmp_path, capsys):
    words = ["--pad_to_multiple_of", "96", "--dry_run"]
    main("dpo", [*arguments(tmp_path, pairs_file(tmp_path)), *words])
    assert "rows like these (8 x 96, " in " ".join(capsys.readouterr().out.split())


class TestAnnouncement:
    """Both kinds of run say first what is trained, on what, how and where."""

    def test_the_dry_run_says_it(self, tmp_path, capsys):
        data = pairs_file(tmp_path)
        more = ["--use_peft", "--lora_r", "4", "--gradient_accumulation_steps", "2", "--learning_rate", "0.25"]
        main("npo_rt(beta=0.1)", [*arguments(tmp_path, data), "--beta", "0.3", *more, "--dry_run"])
        shown = capsys.readouterr().out
        for part in ["Objective\n  npo(beta=0.3)\n", "\n  sft(nll='token')\n", "a new LoRA adapter of rank 4",
                     f"{data}: 24 examples, 6 examples held out", "2 steps of 8 examples (4 a process x 2 accumulated",
                     "learning rate 0.25 (linear)", "Device     cpu, float32"]:  # fmt: skip
            assert part in shown

    def test_the_real_run_says_it_before_it_loads_the_model(self, tmp_path, capsys):
        recipe = parse_arguments("kto", arguments(tmp_path, labelled_file(tmp_path)))
        ready = preflight(recipe)
        data = load_data(recipe, ready)
        with pytest.raises(TypeError):  # there is no trainer here
            make_trainer(recipe, ready, data)
        shown = capsys.readouterr().out
        assert shown.index("Objective  kto(beta=0.1") < shown.index("Loading ")
        assert "llama-0, all weights" in shown


class TestPapers:
    def config(self, folder: Path, **options) -> str:
        path = folder / "paper.yaml"
        path.write_text(yaml.safe_dump({"paper": {"title": "A paper", "devices": "unknown"}, **options}))
        return str(path)

    def test_what_must_be_made_first_ends_the_run_at_once(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        words = ["--config", self.config(tmp_path, model_name_or_path="runs/sft", dataset_name="data/forget.jsonl")]
        with pytest.raises(ValueError, match=r"runs/sft and data/forget.jsonl must be made first"):
            main("npo_rt", words)
        main("npo_rt", [*words, "--dry_run"])
        assert "must be made first; the paper's 'differs' says how" in capsys.readouterr().out.replace("\n", " ")

    def test_unknown_devices_are_not_multiplied(self, tmp_path, capsys):
        main("dpo", [*arguments(tmp_path, pairs_file(tmp_path)), "--config", self.config(tmp_path), "--dry_run"])
        shown = capsys.readouterr().out
        assert "process(es) = 4\n" in shown
        assert "on the paper's" not in shown

    def test_known_devices_are(self, tmp_path, capsys):
        path = tmp_path / "known.yaml"
        path.write_text(yaml.safe_dump({"paper": {"title": "A paper", "devices": 8}}))
        main("dpo", [*arguments(tmp_path, pairs_file(tmp_path)), "--config", str(path), "--dry_run"])
        assert "process(es) = 4; on the paper's 8 device(s) 32\n" in capsys.readouterr().out


class TestHeldOut:
    def saved(self, folder: Path, **splits: int) -> str:
        rows = make_pairs(100)
        at, parts = 0, {}
        for name, count in splits.items():
            parts[name], at = rows.select(range(at, at + count)), at + count
        DatasetDict(parts).save_to_disk(str(folder / "saved"))
        return str(folder / "saved")

    @pytest.mark.parametrize("name", ["validation", "valid", "dev", "eval"])
    def test_a_split_of_another_name_is_held_out(self, tmp_path, capsys, name):
        recipe = parse_arguments("dpo", arguments(tmp_path, self.saved(tmp_path, train=15, **{name: 5})))
        data = loaded(recipe)
        assert (len(data.train), len(data.heldout)) == (15, 5)
        assert f"its split '{name}' is held out" in capsys.readouterr().out.replace("\n", " ")
        assert data.heldout_split == name

    def test_the_test_split_comes_first(self, tmp_path):
        data = self.saved(tmp_path, train=15, validation=5, test=4)
        assert len(loaded(parse_arguments("dpo", arguments(tmp_path, data))).heldout) == 4

    def test_a_split_that_was_asked_for_must_be_there(self, tmp_path):
        words = arguments(tmp_path, self.saved(tmp_path, train=15, validation=5), "--dataset_test_split", "prefs")
        with pytest.raises(ValueError, match=r"no split 'prefs'.*'validation'"):
            loaded(parse_arguments("dpo", words))

    def test_rows_of_one_prompt_are_held_out_together(self, tmp_path, capsys):
        rows = [
            {"prompt": f"Question {n}?", "chosen": f" Good answer {m}.", "rejected": f" Bad answer {m}."}
            for n in range(10)
            for m in range(5)
        ]
        (tmp_path / "groups.jsonl").write_text("\n".join(map(json.dumps, rows)))
        words = arguments(tmp_path, str(tmp_path / "groups.jsonl"), "--eval_rows", "10")
        data = loaded(parse_arguments("dpo", words))
        assert (len(data.train), len(data.heldout)) == (40, 10)
        assert not set(data.train["prompt"]) & set(data.heldout["prompt"])
        assert "10 of its 50 rows are held out with all rows of 2 prompts" in capsys.readouterr().out

    def test_that_holds_across_the_sources_of_a_mixture(self, tmp_path):
        for name in ("a", "b"):
            rows = [{"prompt": f"Question {n}?", "chosen": f" {name} {n}.", "rejected": " No."} for n in range(20)]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = f"{tmp_path / 'a.jsonl'}:0.5,{tmp_path / 'b.jsonl'}:0.5"
        rows = loaded(parse_arguments("dpo", arguments(tmp_path, data)))
        assert len(rows.heldout) == 8
        assert not set(rows.train["prompt"]) & set(rows.heldout["prompt"])

    def test_a_split_with_prompts_that_are_trained_on_is_named(self, tmp_path, capsys):
        rows = make_pairs(20)
        parts = {"train": rows.select(range(15)), "test": rows.select(range(12, 20))}
        DatasetDict(parts).save_to_disk(str(tmp_path / "leaking"))
        loaded(parse_arguments("dpo", arguments(tmp_path, str(tmp_path / "leaking"))))
        assert "3 of the 8 rows of the split 'test' have a prompt that is trained on too" in capsys.readouterr().out
        loaded(parse_arguments("dpo", arguments(tmp_path, self.saved(tmp_path, train=15, test=4))))
        assert "trained on too" not in capsys.readouterr().out

    def test_one_prompt_alone_is_said(self, tmp_path, capsys):
        rows = [{"prompt": "Why?", "chosen": f" Good {m}.", "rejected": f" Bad {m}."} for m in range(20)]
        Dataset.from_list(rows).to_json(str(tmp_path / "one.jsonl"))
        data = loaded(parse_arguments("dpo", arguments(tmp_path, str(tmp_path / "one.jsonl"))))
        assert data.heldout is None
        assert "No rows are held out" in capsys.readouterr().out


def test_a_dry_run_can_be_read_in_chinese_and_emoji(tmp_path, capsys):
    row = {
        "prompt": [{"role": "user", "content": "你喜欢猫吗?"}],
        "chosen": [{"role": "assistant", "content": "当然喜欢!🐱"}],
        "rejected": [{"role": "assistant", "content": "不。"}],
    }
    (tmp_path / "zh.jsonl").write_text(json.dumps(row))
    main("dpo", [*arguments(tmp_path, str(tmp_path / "zh.jsonl")), "--eval_rows", "0", "--dry_run"])
    shown = capsys.readouterr().out.replace("\n", "")
    assert "\ufffd" not in shown
    for part in ("你喜欢猫吗", "[当][然][喜][欢][!][🐱]", "[不][。]"):
        assert part in shown


def test_the_tokenizer_is_read_once_unless_the_model_may_have_a_processor(tmp_path, monkeypatch):
    model = str(save_model(tmp_path / "model"))
    words = ["--model_name_or_path", model, "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    ready = preflight(parse_arguments("dpo", words))
    assert ready.processing_class is ready.tokenizer
    monkeypatch.setattr("prefopt.models.load.PROCESSOR_MAPPING_NAMES", {ready.config.model_type: "A processor"})
    assert preflight(parse_arguments("dpo", words)).processing_class is None
