"""A batch: input ids, labels and, when asked for, document ids.

A training sample is a window of ``sequence_length + 1`` consecutive tokens of the packed stream: position i of the
input is asked for token i + 1, so ``input_ids = window[:-1]`` and ``labels = window[1:]`` (next-token prediction,
arXiv:2412.19437 §2.2; multi-token prediction shifts the same labels further itself).

Shapes: sequences = samples in the batch (the data-parallel dim), tokens = sequence_length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.cross_entropy import IGNORE
from kernels.formats import ceil_div

IGNORE_INDEX = IGNORE


@dataclass(frozen=True)
class DamagedWindow:
    """A sample that is not what was written."""

    position: int  # in the data order
    file: str  # of the store
    block: int | None  # None where the file as a whole cannot be read
    error: str  # one sentence


@dataclass(frozen=True)
class Batch:
    """Samples of one step or of one evaluation call, all tensors [sequences, tokens] int64.

    Labels are IGNORE_INDEX where there is no target. Document ids are counted from 0 inside each window, one after the
    other; without them attention is not limited to a document.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor | None = None
    damaged: tuple[DamagedWindow, ...] = ()

    @property
    def num_targets(self) -> int:
        """Number of positions with a target."""
        return int((self.labels != IGNORE_INDEX).sum())

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """The batch's tensors by name, on a device; document ids, if any, on the host, where the model reads them."""
        tensors = {"input_ids": self.input_ids, "labels": self.labels}
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return tensors if self.document_ids is None else tensors | {"document_ids": self.document_ids}

    def share(self, index: int, shares: int) -> Batch:
        """The index-th of so many equal shares of the sequences, filled up with copies of the first without targets."""
        sequences = ceil_div(len(self.labels), shares)
        rows = torch.arange(index * sequences, (index + 1) * sequences)
        is_copy = rows >= len(self.labels)
        rows[is_copy] = 0
        labels = self.labels[rows]
        labels[is_copy] = IGNORE_INDEX
        document_ids = None if self.document_ids is None else self.document_ids[rows]
        return Batch(self.input_ids[rows], labels, document_ids)


def batch_from_windows(windows: NDArray[np.int64], documents: NDArray[np.int64], *, mask_documents: bool) -> Batch:
    """Split windows [sequences, tokens + 1] of the packed stream into inputs and labels.

    A negative id means "no token here" and becomes input 0 and label IGNORE_INDEX. `documents`, of the same shape, has
    the running number of each token's document, for the batch's document ids.
    """
    tokens = torch.from_numpy(windows)  # [sequences, tokens + 1]
    inputs = tokens[:, :-1].clamp(min=0)  # [sequences, tokens]
    labels = tokens[:, 1:].clone()  # [sequences, tokens]
    labels[labels < 0] = IGNORE_INDEX
    numbers = torch.from_numpy(documents)[:, :-1]  # [sequences, tokens]
    return Batch(inputs, labels, numbers - numbers[:, :1] if mask_documents else None)
