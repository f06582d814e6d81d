"""Parallelism over tensors, modules and meshes; it imports neither a model nor the trainer."""
