"""One of two processes that unlearn together and count what each asks; started by `test_shared_questions.py`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prefopt.recipe.unlearning import main
from prefopt.unlearning import measure, scores
from tests.reliability.faults import wrap


def unlearn(folder: Path, argv: list[str]) -> dict[str, Any]:
    """Results of the recipe, and how many rows this process scored and how many questions it asked."""
    counts = {"scored": 0, "asked": 0}

    def scored(_: int, original: Any, parts: Any, limit: int) -> Any:
        counts["scored"] += len(parts)
        return original(parts, limit)

    def asked(_: int, original: Any, model: Any, tokenizer: Any, questions: Any, **keywords: Any) -> Any:
        counts["asked"] += len(questions)
        return original(model, tokenizer, questions, **keywords)

    wrap(scores, "_batches", scored)
    wrap(measure, "answer_questions", asked)
    results = main(argv=argv)
    return {"results": results, **counts}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    mine = unlearn(folder, sys.argv[2:])
    (folder / f"process-{dist.get_rank() if dist.is_initialized() else 'alone'}.json").write_text(json.dumps(mine))
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # taking a gloo group down can deadlock with the interpreter's lock
