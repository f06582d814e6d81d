"""Kernels and layers against their peers: parity first, then time."""
