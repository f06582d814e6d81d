"""What a model's samples looked like in training: what a prompt or a score must repeat.

A packed sample of ours begins with one end-of-sentence token, the end of the document before it (`stream.py`); the
released models begin a text with their begin-of-sentence token. The checkpoint records which of the two a model was
trained on; an export writes it under `KEY` of config.json, which other programs ignore, and an import reads it back. A
folder without it is taken for a released model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from reprlib import repr as short
from typing import Any, Literal, get_args

from train.data.store import SpecialIds

# Of config.json and of an imported checkpoint's state.
KEY = "v3fp8_trained_on"
FirstToken = Literal["bos", "eos"]


@dataclass(frozen=True)
class TrainedOn:
    """The samples of a model's training, as far as they are known."""

    first_token: FirstToken = "bos"  # "eos" for runs of ours
    sequence_length: int | None = None
    mask_documents: bool = False  # whether attention was limited to a document
    tokenizer_sha256: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, origin: str) -> TrainedOn:
        """What the file `origin` has under `KEY` (nothing: a released model); a ValueError refuses what is not ours."""
        mark = values.get(KEY, {})
        kinds: dict[str, Any] = {"sequence_length": int | None, "mask_documents": bool, "tokenizer_sha256": str | None}
        if (
            not isinstance(mark, dict)
            or mark.get("first_token", "bos") not in get_args(FirstToken)
            or mark.keys() - {"first_token", *kinds}
            or not all(isinstance(mark[name], kind) for name, kind in kinds.items() if name in mark)
            # True is an int too.
            or (length := mark.get("sequence_length")) is True
            or (length is not None and length < 1)
        ):
            raise ValueError(
                f"{origin} has {KEY}={short(mark)}, which this version cannot read; export the model again"
            )
        return cls(**mark)

    def to_json(self) -> dict[str, Any]:
        """{KEY: the mark}; nothing for a model of which nothing is known but the default."""
        return {} if self == TrainedOn() else {KEY: asdict(self)}

    def first_id(self, ids: SpecialIds) -> int:
        """The token that begins a sequence."""
        return ids.bos if self.first_token == "bos" else ids.eos
