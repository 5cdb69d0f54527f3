"""Questions, paraphrases and wrong answers from a user's own documents: `prefopt unlearn prepare`.

Documents are cut into passages; a generator writes questions about each, rewords them, and writes wrong answers. What
it writes is data: parsed by fixed rules, checked, and counted where it cannot be used.
"""

from prefopt.unlearning.prepare.documents import Document, Passage, passages_of, read_documents
from prefopt.unlearning.prepare.prompts import Prompts
from prefopt.unlearning.prepare.stages import Prepared, Refusal, Wanted, prepare

__all__ = [
    "Document", "Passage", "Prepared", "Prompts", "Refusal", "Wanted", "passages_of", "prepare", "read_documents",
]  # fmt: skip
