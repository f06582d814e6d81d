"""The parallel floor: it knows tensors, modules and meshes, never a model and never the trainer."""
