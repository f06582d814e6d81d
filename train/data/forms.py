"""What the rows of a source are and how they become rows of a store: texts, or conversations (`train/chat/ingest.py`).

A source is read into texts, one a row (`sources.py`), and these are encoded in batches, maybe in several processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from train.data.index import ScannedFiles
from train.data.readers import Parse
from train.data.sources import Documents
from train.data.store import ChatRecord
from train.data.tokenizer import TextTokenizer

# Column -> values of each row that is kept.
Columns = dict[str, list[NDArray[np.integer[Any]]]]


class Described(NamedTuple):
    """Of a store just written: the bytes of text that a score divides by, and the record of conversations."""

    text_bytes: int
    chat: ChatRecord | None


class Form(Protocol):
    """One kind of rows."""

    @property
    def columns(self) -> dict[str, str | None]:
        """Column of the store -> type of its values, None for that of ids; the ids first."""

    @property
    def parse(self) -> Parse | None:
        """Makes a text of a whole row, empty for a row that is left out; None where one field is the text."""

    def compared(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a recipe, and others, that can change the result."""

    def texts(self, rows: Iterable[str]) -> Iterable[str]:
        """What a tokeniser is trained on."""

    def encode(self, rows: list[str], tokenizer: TextTokenizer) -> Columns:
        """The rows' values in every column; fewer where some are left out."""

    def describe(
        self, documents: Documents, tokenizer: TextTokenizer, files: list[Path], scanned: ScannedFiles
    ) -> Described:
        """What the manifest says of Arrow files just written."""


class TextForm:
    """Rows are texts: a document is the tokens of one and an end-of-sentence token."""

    columns: dict[str, str | None] = {"input_ids": None}  # noqa: RUF012  (a Protocol's instance variable)
    parse = None

    def compared(self, fields: dict[str, Any]) -> dict[str, Any]:
        """All of the recipe."""
        return fields

    def texts(self, rows: Iterable[str]) -> Iterable[str]:
        """The texts."""
        return rows

    def encode(self, rows: list[str], tokenizer: TextTokenizer) -> Columns:
        """Their ids."""
        eos = tokenizer.special_ids.eos
        return {"input_ids": [np.append(ids, eos) for ids in tokenizer.encode_arrays(rows)]}

    def describe(
        self, documents: Documents, tokenizer: TextTokenizer, files: list[Path], scanned: ScannedFiles
    ) -> Described:
        """The bytes of all texts."""
        return Described(int(documents.text_bytes.sum()), None)
