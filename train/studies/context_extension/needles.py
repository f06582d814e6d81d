"""Documents with needles: text, one token a character, in which keys get a value once and are asked for once, later.

    ... and the <C=3> earth was without form, and vo<C?> 3 id; and darkness ...
                planted                               asked, answered

One token plants a key with its value, so that one look back answers a question: small models learn it. A question is a
token of the key alone; the token after it is the value. No key is planted or asked twice in a document, so the answer
stands at one place, at whatever distance. Text fills what is left, lower-case, a random piece of it for each document.

Shapes: tokens [documents, length + 1] int64, of which a model reads the first `length`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from train.data.batch import IGNORE_INDEX

NUM_KEYS, NUM_VALUES = 4, 8
# Of a guess among the values.
CHANCE = 1 / NUM_VALUES


@dataclass(frozen=True)
class Symbols:
    """Token ids: characters first, then values, questions, and plants, one for each key and value."""

    characters: str

    @property
    def vocab_size(self) -> int:
        """All of them, up to a multiple of 64."""
        return -(-self.plant(NUM_KEYS, 0) // 64) * 64

    def value(self, value: int) -> int:
        """The answer."""
        return len(self.characters) + value

    def question(self, key: int) -> int:
        """Asks for a key's value."""
        return self.value(NUM_VALUES) + key

    def plant(self, key: int, value: int) -> int:
        """Gives a key its value."""
        return self.question(NUM_KEYS) + NUM_VALUES * key + value


@dataclass(frozen=True)
class Source:
    """Text as token ids, and the symbols that it is written in."""

    ids: Sequence[int]
    symbols: Symbols

    @classmethod
    def of(cls, path: Path) -> Source:
        """The `text` of each line of a JSONL file, lower-case, end to end."""
        with path.open(encoding="utf-8") as lines:
            text = " ".join(json.loads(line)["text"] for line in lines).lower()
        symbols = Symbols("".join(sorted(set(text))))
        numbers = {character: index for index, character in enumerate(symbols.characters)}
        return cls([numbers[character] for character in text], symbols)

    def piece(self, length: int, chance: random.Random) -> list[int]:
        """Some consecutive characters."""
        start = chance.randrange(len(self.ids) - length)
        return list(self.ids[start : start + length])


def document(source: Source, length: int, chance: random.Random, *, num_needles: int) -> list[int]:
    """`length` tokens with so many needles, each planted before it is asked for, at random places."""
    symbols, keys = source.symbols, chance.sample(range(NUM_KEYS), num_needles)
    filler = length - 3 * num_needles
    assert filler >= 0, (length, num_needles)
    # Of each key two places in the text; both may lie at the same one.
    events: list[tuple[int, float, list[int]]] = []
    for key in keys:
        value = chance.randrange(NUM_VALUES)
        first, second = sorted((chance.randint(0, filler), chance.random()) for _ in range(2))
        events.append((*first, [symbols.plant(key, value)]))
        events.append((*second, [symbols.question(key), symbols.value(value)]))
    text, tokens, last = source.piece(filler, chance), list[int](), 0
    for place, _, inserted in sorted(events):
        tokens += text[last:place] + inserted
        last = place
    return tokens + text[last:]


def training_documents(source: Source, count: int, length: int, chance: random.Random) -> Tensor:
    """Documents with one needle, or two, up to one of each key."""
    numbers = [chance.randint(1, NUM_KEYS) for _ in range(count)]
    return torch.tensor([document(source, length + 1, chance, num_needles=number) for number in numbers])


def haystack(
    source: Source, length: int, depth: float, chance: random.Random, *, distractors: int
) -> tuple[list[int], int]:
    """A document that ends with a question, and its answer.

    Args:
        length: tokens, the question included.
        depth: where its key is planted, 0 at the beginning, 1 right before the question.
        distractors: other keys that are planted at random places and not asked for.
    """
    symbols, (key, *others) = source.symbols, chance.sample(range(NUM_KEYS), 1 + distractors)
    value = chance.randrange(NUM_VALUES)
    tokens = source.piece(length - 1, chance)
    planted = round(depth * (length - 2))
    places = chance.sample([place for place in range(length - 1) if place != planted], distractors)
    tokens[planted] = symbols.plant(key, value)
    for other, place in zip(others, places, strict=True):
        tokens[place] = symbols.plant(other, chance.randrange(NUM_VALUES))
    return [*tokens, symbols.question(key)], symbols.value(value)


def share_right(logits: Tensor, answers: Tensor) -> float:
    """Of [documents, vocab] logits behind the question: how often the answer is the most likely token of all."""
    return float((logits.argmax(-1) == answers).double().mean())


def known_labels(source: Source, labels: Tensor) -> Tensor:
    """Labels with plants and questions left out: they are drawn, and nobody can know them."""
    return labels.where(labels < source.symbols.question(0), IGNORE_INDEX)


def text_labels(source: Source, labels: Tensor) -> Tensor:
    """Labels with those that are no characters left out."""
    return labels.where(labels < len(source.symbols.characters), IGNORE_INDEX)
