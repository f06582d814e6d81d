"""Initial values by parameter *name* (arXiv:2412.19437 §4.2: normal, std 0.006, for all learnable parameters).

Each tensor (each expert of a stack) draws from its own generator, seeded by (seed, name): the values depend neither on
the order of construction nor on the layout. Norm gains start at 1, biases of the router at 0. Why the embedding may
have a spread of its own: docs/decisions/0004-embedding-spread.md.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from train.model.moe import Experts


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose state depends on (seed, name) only."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _draw(out: Tensor, *, std: float, seed: int, name: str) -> None:
    values = torch.randn(out.shape, generator=generator_for(seed, name), dtype=torch.float32)
    out.copy_(values.mul_(std))


@torch.no_grad()
def initialize(model: nn.Module, *, seed: int, std: float, embedding_std: float | None = None) -> None:
    """Set every parameter of `model` in place.

    Args:
        model: a Transformer or a stage of one; names must be those of the whole model.
        seed: run seed.
        std: standard deviation of the normal draws (`initializer_range`).
        embedding_std: that of the token embedding; None for `std`.
    """
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}" if module_name else leaf
            if "norm" in name.split(".")[-2]:
                parameter.fill_(1.0)
            elif isinstance(module, Experts):
                for index, expert in enumerate(parameter.unbind(0)):
                    _draw(expert, std=std, seed=seed, name=f"{name}.{module.first_expert + index}")
            else:
                own = embedding_std if name.startswith("embed_tokens") else None
                _draw(parameter, std=std if own is None else own, seed=seed, name=name)
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf == "e_score_correction_bias":
                buffer.zero_()
