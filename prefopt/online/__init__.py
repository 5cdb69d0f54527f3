"""Rounds: sample, judge, pair, train, again. The stages meet in JSONL files: each can be run or replaced alone."""
