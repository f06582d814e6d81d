"""Documents with needles: text, one token a character, in which keys get values and are asked for once, later.

    ... and the <C=5> earth was <C=3> without form, and vo<C?> 3 id; and darkness ...
                stale           the needle              asked, answered

One token plants a key with its value, so that one look back answers a question: small models learn it. A question is a
token of the key alone; the token after it is the value. A key may be planted twice, with two values, of which the later
one counts: whoever finds the key and cannot tell the order of two distant places is right every second time. Text fills
what is left, lower-case, a random piece of it for each document.

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
# Of a guess among the values, and of one among the values that the key has had.
CHANCE, WITHOUT_ORDER = 1 / NUM_VALUES, 1 / 2


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


def _values(chance: random.Random) -> list[int]:
    """A stale value of a key, and another one that counts."""
    return chance.sample(range(NUM_VALUES), 2)


def document(source: Source, length: int, chance: random.Random, *, num_needles: int) -> list[int]:
    """`length` tokens with so many needles, each asked for after it, about half behind a stale plant of their key."""
    symbols = source.symbols
    inserted: list[list[list[int]]] = []
    for key in chance.sample(range(NUM_KEYS), num_needles):
        values = _values(chance)[chance.randrange(2) :]
        plants = [[symbols.plant(key, value)] for value in values]
        inserted.append([*plants, [symbols.question(key), symbols.value(values[-1])]])
    filler = length - sum(len(tokens) for events in inserted for tokens in events)
    assert filler >= 0, (length, num_needles)
    # Each event has a place in the text; several may have the same one. Half of the keys are asked for at the end, so
    # that large distances are as frequent as small ones.
    placed: list[tuple[int, float, list[int]]] = []
    for events in inserted:
        places = sorted((chance.randint(0, filler), chance.random()) for _ in events)
        if chance.randrange(2):
            places[-1] = (filler, 1 + chance.random())
        placed += [(*place, event) for place, event in zip(places, events, strict=True)]
    text, tokens, last = source.piece(filler, chance), list[int](), 0
    for place, _, event in sorted(placed):
        tokens += text[last:place] + event
        last = place
    return tokens + text[last:]


def training_documents(source: Source, count: int, length: int, chance: random.Random) -> Tensor:
    """Documents with one needle, or two, up to one of each key."""
    numbers = [chance.randint(1, NUM_KEYS) for _ in range(count)]
    return torch.tensor([document(source, length + 1, chance, num_needles=number) for number in numbers])


def haystack(source: Source, length: int, depth: float, chance: random.Random) -> tuple[list[int], int]:
    """A document that ends with a question, and its answer; every key is planted twice.

    Args:
        length: tokens, the question included.
        depth: where the needle is, above 0, 1 right before the question; its stale plant is somewhere before.
    """
    symbols, (key, *others) = source.symbols, chance.sample(range(NUM_KEYS), NUM_KEYS)
    tokens = source.piece(length - 1, chance)
    place = round(depth * (length - 2))
    stale_place = chance.randrange(place)
    stale, value = _values(chance)
    tokens[place], tokens[stale_place] = symbols.plant(key, value), symbols.plant(key, stale)
    free = [each for each in range(length - 1) if each not in (place, stale_place)]
    places = iter(chance.sample(free, 2 * len(others)))
    for other in others:
        for distractor in _values(chance):
            tokens[next(places)] = symbols.plant(other, distractor)
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
