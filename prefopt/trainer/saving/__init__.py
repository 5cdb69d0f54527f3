"""How runs are written to disk and resumed: checkpoints, free space, stop signals, the state between steps."""
