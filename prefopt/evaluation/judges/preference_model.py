"""A judge that is a model of preferences: it reads both completions, and says how likely the first is better."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefopt.evaluation.judges.base import Choice, Contest, choice_of
from prefopt.evaluation.judges.llm import facts_of, filled, places_of
from prefopt.evaluation.judges.loaded import LoadedModel
from prefopt.generation.samples import Text
from prefopt.safety.errors import UsageError
from prefopt.scoring.fingerprint import fingerprint

PAIR_FORM = "[CONTEXT] {prompt} [RESPONSE A] {first} [RESPONSE B] {second} \n"
"""What RLHFlow's models of preferences were trained on."""


class PreferenceModelJudge:
    """Compares two completions with a model that has seen both.

    The architecture in the model's configuration says how its answer is read:

    - a causal language model: the next token is A or B, and the probability of A among the two is that of the first.
      Without a rubric the text is `PAIR_FORM`, in a user's message of the model's chat template and without its token
      for the beginning, as RLHFlow/pair-preference-model-LLaMA3-8B expects it.
    - a sequence classifier with two outputs, the logits of the first and of the second, or with one, the logit of the
      first. It reads the text as it is.

    Both orders are asked, so that a liking for one place cancels out.

    Args:
        model: a Hub name or a folder, with safetensors.
        rubric: a file with `{prompt}`, `{first}` and `{second}` in place of `PAIR_FORM`.
        name: of the judge.
        batch_size: texts at once.
        device: cpu, cuda, ...; the first accelerator if left out.
        both_orders: ask about each pair in both orders.

    Reference: Dong et al. 2024, arXiv 2405.07863 (RLHF Workflow), the pair preference model.
    """

    cached = True
    repeats = 1

    def __init__(
        self,
        model: str,
        rubric: str = "",
        name: str = "preference",
        batch_size: int = 8,
        device: str = "",
        both_orders: bool = True,
    ):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

        self._rubric, self.name = _rubric(rubric), name
        architectures = getattr(AutoConfig.from_pretrained(model), "architectures", None) or [""]
        self._classifies = architectures[0].endswith("ForSequenceClassification")
        kind = AutoModelForSequenceClassification if self._classifies else AutoModelForCausalLM
        self._loaded = LoadedModel(kind, model, device)
        self._batch_size, self.both_orders = batch_size, both_orders
        if self._classifies:
            _check_outputs(model, self._loaded.network.config.num_labels)
        else:
            self._letters = [_letter(self._loaded.tokenizer, letter) for letter in "AB"]
        self.settings: Mapping[str, Any] = {
            "preference_model": fingerprint(self._loaded.network), "both_orders": both_orders,
            "template": getattr(self._loaded.tokenizer, "chat_template", None),
            "rubric": hashlib.sha256((self._rubric or PAIR_FORM).encode("utf-8")).hexdigest(),
        }  # fmt: skip

    @torch.inference_mode()
    def compare(self, contests: Sequence[Contest]) -> list[Choice]:
        ids = [self._ids(one) for one in contests]
        shares = [0.0] * len(ids)
        for numbers, inputs in self._loaded.batches(ids, self._batch_size):
            margins = self._classified(inputs) if self._classifies else self._next_token(inputs)
            for number, share in zip(numbers, torch.sigmoid(margins.float()).tolist(), strict=True):
                shares[number] = share
        return [choice_of(share) for share in shares]

    def _classified(self, inputs: Any) -> Tensor:
        """(N,) log-odds of the first."""
        logits: Tensor = self._loaded.network(**inputs).logits
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 0] - logits[:, 1]

    def _next_token(self, inputs: Any) -> Tensor:
        """(N,) log-odds of the token A against B after each text."""
        ends = inputs["attention_mask"].sum(1) - 1
        kept, places = ends.unique(return_inverse=True)
        options: dict[str, Any] = {"logits_to_keep": kept}
        if "logits_to_keep" not in inspect.signature(self._loaded.network.forward).parameters:
            options, places = {}, ends
        logits: Tensor = self._loaded.network(**inputs, **options).logits
        last = logits[torch.arange(len(places), device=logits.device), places]
        first, second = self._letters
        return last[:, first] - last[:, second]

    def _ids(self, contest: Contest) -> list[int]:
        tokenizer = self._loaded.tokenizer
        facts = {"first": contest.first, "second": contest.second}
        if self._rubric:
            text = filled(self._rubric, {**facts_of(contest.prompt, contest.columns), **facts})
        else:
            text = filled(PAIR_FORM, {"prompt": _turns(contest.prompt), **facts})
        if self._classifies or not getattr(tokenizer, "chat_template", None):
            return list(tokenizer(text)["input_ids"])
        message = [{"role": "user", "content": text}]
        whole = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        if not self._rubric and tokenizer.bos_token:
            whole = whole.replace(tokenizer.bos_token, "")
        return list(tokenizer(whole, add_special_tokens=False)["input_ids"])


def _rubric(file: str) -> str:
    if not file:
        return ""
    text = Path(file).read_text(encoding="utf-8")
    if not {"first", "second"} <= places_of(text):
        raise UsageError(f"{file} must have {{first}} and {{second}}, where the answers are to stand")
    return text


def _turns(prompt: Text) -> str:
    """A conversation as in the training data of RLHFlow's models."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return "\n" + "".join(f"\n<turn> {one['role']}\n {one['content']}" for one in messages) + "\n"


def _letter(tokenizer: Any, letter: str) -> int:
    ids = tokenizer(letter, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UsageError(f"a judge that answers A or B needs a token for each; this tokenizer has none for {letter}")
    return int(ids[0])


def _check_outputs(model: str, outputs: int) -> None:
    if outputs not in (1, 2):
        raise UsageError(
            f"{model} has {outputs} outputs; a classifier of two answers has two (the first, the second) or one (the "
            "logit of the first)"
        )
