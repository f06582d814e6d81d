"""The needle test asks what it says, scores it right, and a stored phase is read again."""

from __future__ import annotations

import random
import string
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from train.data.batch import IGNORE_INDEX
from train.studies.context_extension import __main__ as command
from train.studies.context_extension import needles, runs
from train.studies.context_extension.needles import NUM_KEYS, NUM_VALUES, Source, Symbols
from train.studies.context_extension.pages import mean_of, spread_of

SYMBOLS = Symbols(string.ascii_lowercase)
SOURCE = Source([i % 26 for i in range(5000)], SYMBOLS)
TEXT = Path(__file__).resolve().parents[2] / "data/king_james_bible/text.jsonl"


def test_every_symbol_has_an_id_of_its_own() -> None:
    keys, values = range(NUM_KEYS), range(NUM_VALUES)
    ids = [*range(26), *map(SYMBOLS.value, values), *map(SYMBOLS.question, keys)]
    ids += [SYMBOLS.plant(key, value) for key in keys for value in values]
    assert ids == [*range(len(ids))]
    assert SYMBOLS.vocab_size - 64 < len(ids) <= SYMBOLS.vocab_size


def test_each_key_is_planted_once_before_it_is_asked_and_answered_with_what_was_planted() -> None:
    chance = random.Random(3)
    for length in (3 * NUM_KEYS, 40, 129):
        tokens = needles.document(SOURCE, length, chance, num_needles=NUM_KEYS)
        assert len(tokens) == length
        for key in range(NUM_KEYS):
            asked = tokens.index(SYMBOLS.question(key))
            value = tokens[asked + 1] - SYMBOLS.value(0)
            assert tokens.index(SYMBOLS.plant(key, value)) < asked
            assert sum(token in [SYMBOLS.plant(key, v) for v in range(NUM_VALUES)] for token in tokens) == 1
            assert tokens.count(SYMBOLS.question(key)) == 1
        text = [token for token in tokens if token < 26]
        assert len(text) == length - 3 * NUM_KEYS
        assert all((b - a) % 26 == 1 for a, b in pairwise(text)), "text goes on around needles"


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 49), (1.0, 98)])
def test_a_needle_lies_at_its_depth_and_is_asked_at_the_end(depth: float, place: int) -> None:
    tokens, answer = needles.haystack(SOURCE, 100, depth, random.Random(1), distractors=NUM_KEYS - 1)
    key = tokens[-1] - SYMBOLS.question(0)
    assert len(tokens) == 100
    assert tokens[place] == SYMBOLS.plant(key, answer - SYMBOLS.value(0))
    assert sum(token >= SYMBOLS.plant(0, 0) for token in tokens) == NUM_KEYS, "each other key once, as a distractor"


def test_an_answer_counts_if_it_is_the_most_likely_token_of_all() -> None:
    logits = torch.zeros(4, SYMBOLS.vocab_size)
    logits[0, 30], logits[1, 31], logits[2, 5], logits[3, 28] = 1, 1, 1, 1
    # Right; another value; a letter where the value comes second; right.
    logits[2, 27] = 0.5
    assert needles.share_right(logits, torch.tensor([30, 30, 27, 28])) == 0.5


def test_what_was_drawn_is_no_target_and_text_is_told_from_needles() -> None:
    labels = torch.tensor([3, SYMBOLS.value(1), SYMBOLS.question(0), SYMBOLS.plant(1, 2)])
    assert needles.known_labels(SOURCE, labels).tolist() == [3, SYMBOLS.value(1), IGNORE_INDEX, IGNORE_INDEX]
    assert needles.text_labels(SOURCE, labels).tolist() == [3, *[IGNORE_INDEX] * 3]


def test_means_and_spreads_over_seeds() -> None:
    seeds = [{"needles": {"128": {"0.0": share}}} for share in (0.5, 0.7, 0.9)]
    assert mean_of(seeds, "needles", "128", "0.0") == pytest.approx(0.7)
    assert spread_of(seeds, "needles", "128", "0.0") == "70% (50% to 90%)"


@pytest.mark.long
def test_the_study_runs_and_what_is_stored_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = runs.StudySize(base_steps=1, extend_steps=1, tokens_per_step=2048, seeds=(0,), depths=(0.0,), documents=1)
    monkeypatch.setattr(command, "SMOKE", tiny)
    arguments = ["--smoke", "--text", str(TEXT), "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    files = {path.name for path in tmp_path.iterdir()}
    assert {"result.json", "tables.md", "context_extension.html", "2048_YaRN-0.safetensors"} <= files
    table = (tmp_path / "tables.md").read_text()
    assert all(f"| {length} | 0.0 |" in table for length in runs.LENGTHS)
    monkeypatch.setattr(runs, "_train", lambda *_: pytest.fail("trained again"))
    assert command.main(arguments) == 0
    assert (tmp_path / "tables.md").read_text() == table
    monkeypatch.setattr(command, "SMOKE", runs.StudySize(base_steps=2))
    capsys.readouterr()
    assert command.main(arguments) == 2
    assert "holds a study with other settings: give --out another folder" in capsys.readouterr().err
