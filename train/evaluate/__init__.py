"""Evaluation: held-out bits per byte, multiple choice, exact match, tasks of lm-eval."""
