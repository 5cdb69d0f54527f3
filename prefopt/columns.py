"""Names of data columns that both the checks of the data and the scorer know. Imports nothing."""

GIVEN_LOGPS = ("ref_chosen_logps", "ref_rejected_logps", "prev_chosen_logps", "prev_rejected_logps")
"""Log-probabilities of a reference and of a previous iterate, where they come with the data."""
EMBEDDINGS = ("prompt_embedding", "chosen_embedding", "rejected_embedding")
"""Vectors, all of one width, for objectives that compare embeddings."""
