"""The bundled default job: a small model, a preference set with a rule that a person can see, and its report."""
