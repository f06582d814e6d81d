"""What a model's samples looked like when it was trained: what whoever prompts or scores it must repeat.

A packed sample of ours begins with one end-of-sentence token, the end of the document before it (`stream.py`); the
released models begin a text with their begin-of-sentence token. Which of the two a model knows is written into its
checkpoint, travels with an export to a Hugging Face folder (under `KEY` of its config.json, which other programs
ignore) and comes back with an import. A folder without that mark is taken for a released model.

Shapes: none. Not here: how samples are made (`stream.py`), where weights come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from train.data.store import SpecialIds

# Of config.json and of an imported checkpoint's state.
KEY = "v3fp8_trained_on"
FirstToken = Literal["bos", "eos"]


@dataclass(frozen=True)
class TrainedOn:
    """The samples of a model's training, as far as they are known.

    Args:
        first_token: special token that begins a sequence: "eos" for runs of ours, "bos" for released models.
        sequence_length: tokens of a sample; None where it is unknown.
        mask_documents: whether attention was limited to a document.
        tokenizer_sha256: of the tokeniser's file; None where it is unknown.
    """

    first_token: FirstToken = "bos"
    sequence_length: int | None = None
    mask_documents: bool = False
    tokenizer_sha256: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, origin: str) -> TrainedOn:
        """What a file says under `KEY`; where it says nothing, a released model.

        Args:
            values: content of the file.
            origin: the file, for messages.
        Raises:
            ValueError: the mark is there but is none of ours.
        """
        mark = values.get(KEY, {})
        kinds: dict[str, tuple[type, ...]] = {
            "sequence_length": (int, type(None)),
            "mask_documents": (bool,),
            "tokenizer_sha256": (str, type(None)),
        }
        if (
            not isinstance(mark, dict)
            or mark.get("first_token", "bos") not in get_args(FirstToken)
            or mark.keys() - {"first_token", *kinds}
            or not all(isinstance(mark[name], kind) for name, kind in kinds.items() if name in mark)
        ):
            raise ValueError(f"{origin} has {KEY}={mark!r}, which this version cannot read; export the model again")
        return cls(**mark)

    def to_json(self) -> dict[str, Any]:
        """{KEY: the mark}; nothing for a model of which nothing is known but the default."""
        return {} if self == TrainedOn() else {KEY: asdict(self)}

    def first_id(self, ids: SpecialIds) -> int:
        """The token that begins a sequence."""
        found: int = getattr(ids, self.first_token)
        return found
