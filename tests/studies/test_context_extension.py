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
from train.studies.context_extension.pages import mean_of

SYMBOLS = Symbols(string.ascii_lowercase)
SOURCE = Source([i % 26 for i in range(5000)], SYMBOLS)
TEXT = Path(__file__).resolve().parents[2] / "data/king_james_bible/text.jsonl"


def test_every_symbol_has_an_id_of_its_own() -> None:
    keys, values = range(NUM_KEYS), range(NUM_VALUES)
    ids = [*range(26), *map(SYMBOLS.value, values), *map(SYMBOLS.question, keys)]
    ids += [SYMBOLS.plant(key, value) for key in keys for value in values]
    assert ids == [*range(len(ids))]
    assert SYMBOLS.vocab_size - 64 < len(ids) <= SYMBOLS.vocab_size


def plants(tokens: list[int], key: int) -> list[tuple[int, int]]:
    """Place and value of each plant of a key."""
    known = {SYMBOLS.plant(key, value): value for value in range(NUM_VALUES)}
    return [(place, known[token]) for place, token in enumerate(tokens) if token in known]


def test_each_key_is_asked_once_behind_its_plants_and_answered_with_the_last_value() -> None:
    chance, stale = random.Random(3), 0
    for length in [4 * NUM_KEYS, 40, 129] * 4:
        tokens = needles.document(SOURCE, length, chance, num_needles=NUM_KEYS)
        assert len(tokens) == length
        for key in range(NUM_KEYS):
            asked, planted = tokens.index(SYMBOLS.question(key)), plants(tokens, key)
            assert tokens.count(SYMBOLS.question(key)) == 1
            assert max(planted)[0] < asked
            assert tokens[asked + 1] == SYMBOLS.value(max(planted)[1])
            assert len({value for _, value in planted}) == len(planted) <= 2
            stale += len(planted) - 1
        text = [token for token in tokens if token < 26]
        assert all((b - a) % 26 == 1 for a, b in pairwise(text)), "text goes on around needles"
    # Of 48 keys; a fair coin leaves this range once in 10^4 seeds.
    assert 11 <= stale <= 37


@pytest.mark.parametrize(("depth", "place"), [(0.25, 24), (0.5, 49), (1.0, 98)])
def test_a_needle_lies_at_its_depth_behind_a_stale_one_and_is_asked_at_the_end(depth: float, place: int) -> None:
    for seed in range(8):
        tokens, answer = needles.haystack(SOURCE, 100, depth, random.Random(seed))
        assert len(tokens) == 100
        for key in range(NUM_KEYS):
            (first, stale), (second, value) = plants(tokens, key)
            assert stale != value
            if tokens[-1] == SYMBOLS.question(key):
                assert (second, SYMBOLS.value(value)) == (place, answer)
                assert first < place
        assert sum(token < 26 for token in tokens) == 100 - 2 * NUM_KEYS - 1


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


def test_means_over_seeds() -> None:
    seeds = [{"needles": {"128": {"0.0": share}}} for share in (0.5, 0.7, 0.9)]
    assert mean_of(seeds, "needles", "128", "0.0") == pytest.approx(0.7)


@pytest.mark.long
def test_the_study_runs_and_what_is_stored_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = runs.StudySize(base_steps=1, extend_steps=1, tokens_per_step=2048, seeds=(0,), depths=(0.5,), documents=1)
    monkeypatch.setattr(command, "SMOKE", tiny)
    arguments = ["--smoke", "--text", str(TEXT), "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    files = {path.name for path in tmp_path.iterdir()}
    assert {"result.json", "tables.md", "context_extension.html", "2048_YaRN-0.safetensors"} <= files
    table = (tmp_path / "tables.md").read_text()
    assert all(f"| {length} | 0.5 |" in table for length in runs.LENGTHS)
    monkeypatch.setattr(runs, "_train", lambda *_: pytest.fail("trained again"))
    assert command.main(arguments) == 0
    assert (tmp_path / "tables.md").read_text() == table
    monkeypatch.setattr(command, "SMOKE", runs.StudySize(base_steps=2))
    capsys.readouterr()
    assert command.main(arguments) == 2
    assert "holds a study with other settings: give --out another folder" in capsys.readouterr().err
