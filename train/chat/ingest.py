"""Conversations as a form of `train/data/ingest.py`: rows of messages -> a store with ids and loss mask.

A conversation whose text spells a mark of the template, or another control token, is left out and counted: encoded as
text it would teach to write marks as letters, as a token it would let data begin turns. One of more than `max_tokens`
ids is left out and counted too: none is ever cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from train.chat.messages import Conversation, read_row, spells_a_mark
from train.chat.render import ChatEncoder
from train.chat.template import chat_template
from train.data.forms import Columns, Described
from train.data.index import MASK_DTYPE, ScannedFiles
from train.data.sources import Documents
from train.data.store import ChatRecord
from train.data.tokenizer import TextTokenizer
from train.data.trained_on import FirstToken

SPELLS_A_MARK, TOO_LONG = "text that spells a mark", "longer than max_tokens"


@dataclass(frozen=True)
class ChatForm:
    """Rows are conversations.

    Raises:
        ValueError: max_tokens is below 1.
    """

    columns: ClassVar[dict[str, str | None]] = {"input_ids": None, "loss_mask": MASK_DTYPE}

    first_token: FirstToken = "eos"  # that begins each: as in the model's training, eos for runs of ours
    max_tokens: int | None = None  # longer ones are left out

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens: {self.max_tokens} is not positive; give 1 or more")

    def parse(self, row: dict[str, Any]) -> str:
        """The conversation of a row in the one form; empty where it is left out."""
        text = read_row(row).to_json()
        return "" if spells_a_mark(text) else text

    def compared(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A recipe without what rows of messages do not have, and with what they do."""
        kept = {name: value for name, value in fields.items() if name not in ("text_field", "paragraphs")}
        own = {"first_token": self.first_token, "max_tokens": self.max_tokens, "template_sha256": _template_sha256()}
        return kept | {"format": "messages"} | own

    def texts(self, rows: Iterable[str]) -> Iterator[str]:
        """What is said and thought."""
        for row in rows:
            yield from Conversation.from_json(row).texts

    def encode(self, rows: list[str], tokenizer: TextTokenizer) -> Columns:
        """Ids and loss mask of those that are not too long."""
        encoder = ChatEncoder(tokenizer, first_token=self.first_token)
        encoded = encoder.encode([Conversation.from_json(row) for row in rows])
        kept = [each for each in encoded if self.max_tokens is None or len(each.ids) <= self.max_tokens]
        return {"input_ids": [each.ids for each in kept], "loss_mask": [each.loss_mask for each in kept]}

    def describe(
        self, documents: Documents, tokenizer: TextTokenizer, files: list[Path], scanned: ScannedFiles
    ) -> Described:
        """The bytes of what the assistants say, without marks; a ValueError where every conversation is left out."""
        spelled, kept = int((documents.text_bytes == 0).sum()), len(scanned.found.starts) - 1
        too_long = len(documents.table) - spelled - kept
        if not kept:
            raise ValueError(
                f"source: no conversation is left of {len(documents.table)}: {spelled} have {SPELLS_A_MARK}, "
                f"{too_long} are {TOO_LONG}={self.max_tokens}"
            )
        left_out = {SPELLS_A_MARK: spelled, TOO_LONG: too_long}
        chat = ChatRecord(scanned.targets, self.first_token, _template_sha256(), left_out)
        return Described(sum(_said_bytes(file, tokenizer) for file in files), chat)


def _template_sha256() -> str:
    return hashlib.sha256(chat_template().encode()).hexdigest()


def _said_bytes(file: Path, tokenizer: TextTokenizer) -> int:
    """UTF-8 bytes of the tokens with a loss in an Arrow file, marks apart."""
    import pyarrow as pa

    said = 0
    with pa.memory_map(str(file)) as mapped:
        for batch in pa.ipc.open_stream(mapped):
            ids, mask = (batch.column(name).flatten().to_numpy() for name in ("input_ids", "loss_mask"))
            said += len(tokenizer.core.decode(ids[mask == 1].tolist(), skip_special_tokens=True).encode())
    return said
