"""Judges of samples, and the measures that evaluation reports: accuracy, win rates, intervals, KL, repetition."""
