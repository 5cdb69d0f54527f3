"""Unlearning: forget and retain sets, and what was forgotten and kept."""
