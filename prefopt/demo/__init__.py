"""The bundled default job: a small model, a preference set with a visible rule, and its report."""
