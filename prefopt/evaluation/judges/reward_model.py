"""A judge that is a reward model: a sequence classifier with one number as output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prefopt.evaluation.judges.base import Candidate, Verdict, verdict_of
from prefopt.evaluation.judges.loaded import LoadedModel
from prefopt.safety.errors import UsageError
from prefopt.scoring.fingerprint import fingerprint


class RewardModelJudge:
    """Scores prompt and completion with the single logit of a sequence classifier.

    Messages go through the model's own chat template with the completion as the last answer; a text prompt and its
    completion are joined.

    Args:
        model: a Hub name or a folder, with safetensors.
        name: of the judge.
        batch_size: texts at once.
        device: cpu, cuda, ...; the first accelerator if left out.
    """

    cached = True

    def __init__(self, model: str, name: str = "reward", batch_size: int = 8, device: str = ""):
        from transformers import AutoModelForSequenceClassification

        self._loaded = LoadedModel(AutoModelForSequenceClassification, model, device)
        if (outputs := self._loaded.network.config.num_labels) != 1:
            raise UsageError(
                f"{model} has {outputs} outputs; a reward model has one (num_labels=1). A classifier that reads two "
                "answers is the judge preference:MODEL; for another one, write a function that returns its output"
            )
        self._batch_size, self.name = batch_size, name
        self.settings: Mapping[str, Any] = {
            "reward_model": fingerprint(self._loaded.network),
            "template": getattr(self._loaded.tokenizer, "chat_template", None),
        }

    @torch.inference_mode()
    def score(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        ids = [self._ids(one) for one in candidates]
        scores = [0.0] * len(ids)
        for numbers, inputs in self._loaded.batches(ids, self._batch_size):
            logits = self._loaded.network(**inputs).logits[:, 0].float().tolist()
            for number, score in zip(numbers, logits, strict=True):
                scores[number] = score
        return [verdict_of(score) for score in scores]

    def _ids(self, candidate: Candidate) -> list[int]:
        tokenizer = self._loaded.tokenizer
        if isinstance(candidate.prompt, str):
            return list(tokenizer(candidate.prompt + candidate.completion)["input_ids"])
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(f"the judge {self.name} has no chat template, so it cannot read prompts of messages")
        chat = [*candidate.prompt, {"role": "assistant", "content": candidate.completion}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
