"""Evaluation: held-out bits per byte of a model, and the n-gram and xz figures it has to beat."""
