"""Device code: Triton and Gluon kernels with their launchers, one file per file of `kernels/` that it serves.

Nothing imports this package before a tensor lives on a GPU (`kernels.operators`): importing Triton takes a second, and
Triton exists on Linux only. A launcher has the name and the arguments of the operator that it implements.
"""
