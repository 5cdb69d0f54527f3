"""What a run's own log says about it: rules that read the logged numbers, on a running trainer or a saved run.

`history` reads log lines, `likelihood`, `learning` and `stability` have the rules, `watch` applies them line by line,
`callback` does so inside a trainer, `saved` to a folder. Nothing here runs a model.
"""
