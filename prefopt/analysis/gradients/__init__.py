"""Gradient entanglement: which way the next step moves the chosen and the rejected answers of a pair.

`push` has a loss's derivatives for the two log-probabilities, `entangled` the gradients of a model and the verdicts,
`callback` measures inside a trainer, `saved` on the model of a finished run.
"""
