"""A judge that is a reward model: a sequence classifier with one number as output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prefopt.evaluation.judges.base import Candidate, Verdict, verdict_of
from prefopt.models.load import ModelError, check_weights, load_tokenizer
from prefopt.safety.errors import UsageError, retold
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
        from accelerate import PartialState
        from transformers import AutoModelForSequenceClassification

        check_weights(model)
        with retold(ModelError, f"no reward model can be loaded from {model!r}"):
            loaded = AutoModelForSequenceClassification.from_pretrained(model, use_safetensors=True)
        if loaded.config.num_labels != 1:
            raise UsageError(
                f"{model} has {loaded.config.num_labels} outputs; a reward model has one (num_labels=1). For a "
                "classifier, write a function that returns the output that you want"
            )
        self._tokenizer = load_tokenizer(model)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._tokenizer.padding_side = "right"
        loaded.config.pad_token_id = self._tokenizer.pad_token_id
        self._model = loaded.to(device or PartialState().device).eval()
        self._batch_size, self.name = batch_size, name
        self.settings: Mapping[str, Any] = {
            "reward_model": fingerprint(loaded), "template": getattr(self._tokenizer, "chat_template", None),
        }  # fmt: skip

    @torch.inference_mode()
    def score(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        ids = [self._ids(one) for one in candidates]
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        scores = [0.0] * len(ids)
        for at in range(0, len(order), self._batch_size):
            rows = order[at : at + self._batch_size]
            inputs = self._tokenizer.pad({"input_ids": [ids[n] for n in rows]}, return_tensors="pt")
            logits = self._model(**inputs.to(self._model.device)).logits[:, 0].float().tolist()
            for number, score in zip(rows, logits, strict=True):
                scores[number] = score
        return [verdict_of(score) for score in scores]

    def _ids(self, candidate: Candidate) -> list[int]:
        if isinstance(candidate.prompt, str):
            return list(self._tokenizer(candidate.prompt + candidate.completion)["input_ids"])
        if not getattr(self._tokenizer, "chat_template", None):
            raise UsageError(f"the judge {self.name} has no chat template, so it cannot read prompts of messages")
        chat = [*candidate.prompt, {"role": "assistant", "content": candidate.completion}]
        text = self._tokenizer.apply_chat_template(chat, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
