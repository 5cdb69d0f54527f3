"""What scripts/bench makes without a download, for tests that need more of it than tests/tiny.py has."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

from _made_up import HH, lengths_of, longest_row, pairs_of, random_model, word_tokenizer  # isort: skip

__all__ = ["HH", "lengths_of", "longest_row", "pairs_of", "random_model", "word_tokenizer"]
