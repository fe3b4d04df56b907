"""Ablations: one question, several cells, one budget."""
