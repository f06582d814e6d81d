"""Numerics of FP8 training, one operation per file, importing nothing else of this repository.

Each file holds the plain-torch computation (which is also the CPU path), where it has them, its operator
and its autograd function.
Reading order for FP8 (arXiv:2412.19437 §3.3): `formats` (what E4M3 and a scaled tile are), `quantize` (online scales),
`gemm_fp8` and `gemm_grouped` (products with promotion to FP32), `fp8_linear` (the three GEMMs of a linear), `deferred`
(weight gradients that run later). Error bounds: `docs/numerics.md`.
"""
