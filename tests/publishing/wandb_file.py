"""Reads what Weights & Biases writes in offline mode: LevelDB's log format around protocol buffers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", data[:8]
    at, parts = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # a header does not fit: the rest of the block is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        piece = data[at + 7 : at + 7 + length]
        at += 7 + length
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            yield parts


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], bytes]:
    """A run's configuration, its history in order, and everything in the file as one string of bytes."""
    from wandb.proto import wandb_internal_pb2

    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    whole = b""
    for record in records(path):
        whole += record
        message = wandb_internal_pb2.Record()
        message.ParseFromString(record)
        for update in (*message.config.update, *message.run.config.update):
            config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
        if message.WhichOneof("record_type") == "history":
            items = message.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return config, history, whole
