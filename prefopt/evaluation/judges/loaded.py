"""Models of judges in memory: loaded from safetensors, and run on texts of like length together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prefopt.models.load import ModelError, check_weights, load_tokenizer
from prefopt.safety.errors import retold


class LoadedModel:
    """A model in evaluation mode, with its tokenizer.

    Args:
        kind: the class of transformers that loads it, such as AutoModelForSequenceClassification.
        name: a Hub name or a folder, with safetensors.
        device: cpu, cuda, ...; the first accelerator if left out.

    Raises:
        ModelError: if it cannot be loaded.
    """

    def __init__(self, kind: Any, name: str, device: str = ""):
        from accelerate import PartialState

        check_weights(name)
        with retold(ModelError, f"no model of a judge can be loaded from {name!r}"):
            network = kind.from_pretrained(name, use_safetensors=True)
        self.tokenizer = load_tokenizer(name)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        network.config.pad_token_id = self.tokenizer.pad_token_id
        self.network = network.to(device or PartialState().device).eval()

    def batches(self, ids: Sequence[list[int]], size: int) -> Iterator[tuple[list[int], Any]]:
        """The numbers of the texts of a batch, and its inputs, padded on the right; shorter texts come first.

        Args:
            ids: of each text.
            size: texts in a batch.
        """
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        for at in range(0, len(order), size):
            numbers = order[at : at + size]
            inputs = self.tokenizer.pad({"input_ids": [ids[n] for n in numbers]}, return_tensors="pt")
            yield numbers, inputs.to(self.network.device)
