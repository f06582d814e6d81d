"""Evaluation: held-out bits per byte beside what it has to beat, multiple choice, exact match, generation, lm-eval."""
