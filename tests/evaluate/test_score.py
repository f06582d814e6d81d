"""Held-out bits per byte and perplexity against figures that can be worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.data.handmade import SPECIAL, consecutive, write_store
from train.data.batch import IGNORE_INDEX, Batch
from train.data.store import TokenStore
from train.evaluate.score import LossOfBatch, StoreScore, score_store, total_score


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Three documents, 14 tokens, 40 bytes of text."""
    return write_store(tmp_path_factory.mktemp("score") / "s", consecutive([5, 1, 8]), text_bytes=40)


def bigram_loss(table: torch.Tensor) -> LossOfBatch:
    """A model that knows p(next | last) from a table of logits, FP64."""

    def loss(batch: Batch) -> tuple[float, int]:
        rows = table[batch.input_ids.flatten()]
        nats = torch.nn.functional.cross_entropy(
            rows, batch.labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX
        )
        return float(nats), batch.num_targets

    return loss


@pytest.mark.parametrize("sequence_length", [1, 4, 5, 14, 100])
@pytest.mark.parametrize("batch_sequences", [1, 2, 3])
def test_a_uniform_model_costs_its_vocabulary(store: TokenStore, sequence_length: int, batch_sequences: int) -> None:
    uniform = bigram_loss(torch.zeros(32, 32).double())
    found = score_store(uniform, store, sequence_length=sequence_length, batch_sequences=batch_sequences)
    # 14 tokens of 5 bits over 40 bytes; float64 sums of 14 terms.
    assert found.bits_per_byte == pytest.approx(14 * 5 / 40, rel=1e-14)
    # exp of a mean of 14 float64 logarithms.
    assert found.perplexity == pytest.approx(32, rel=1e-13)
    assert (found.tokens, found.text_bytes) == (14, 40)


def test_every_token_is_scored_once_after_the_token_before(store: TokenStore) -> None:
    pairs: list[tuple[int, int]] = []

    def remember(batch: Batch) -> tuple[float, int]:
        is_target = batch.labels != IGNORE_INDEX
        pairs.extend(zip(batch.input_ids[is_target].tolist(), batch.labels[is_target].tolist(), strict=True))
        return math.log(2), int(is_target.sum())

    # Four batches of one bit each.
    assert score_store(remember, store, sequence_length=4, batch_sequences=1).bits_per_byte == 4 / 40
    tokens = list(range(10, 24))
    assert pairs == list(zip([SPECIAL.eos, *tokens[:-1]], tokens, strict=True))


def test_a_model_that_loses_targets_is_found_out(store: TokenStore) -> None:
    with pytest.raises(AssertionError):
        score_store(lambda batch: (0.0, 1), store, sequence_length=4, batch_sequences=1)


def test_a_non_finite_loss_stays_visible(store: TokenStore) -> None:
    broken = score_store(lambda batch: (math.nan, batch.num_targets), store, sequence_length=4, batch_sequences=2)
    assert math.isnan(broken.bits_per_byte)


def test_document_ids_reach_the_model_when_asked_for(store: TokenStore) -> None:
    seen: list[bool] = []

    def look(batch: Batch) -> tuple[float, int]:
        seen.append(batch.document_ids is not None)
        return 0.0, batch.num_targets

    score_store(look, store, sequence_length=14, batch_sequences=1, mask_documents=True)
    score_store(look, store, sequence_length=14, batch_sequences=1)
    assert seen == [True, False]


def test_perplexity_and_total_equal_a_bigram_worked_out_by_hand(tmp_path: Path) -> None:
    # p(a|eos) = 1/2, p(b|a) = 1/4, p(eos|b) = 1/8; a = 6, b = 7.
    table = torch.full((8, 8), -math.inf, dtype=torch.float64)
    rest = {SPECIAL.eos: (6, 1 / 2), 6: (7, 1 / 4), 7: (SPECIAL.eos, 1 / 8)}
    for context, (target, probability) in rest.items():
        table[context, target] = math.log(probability)
        table[context, 0] = math.log(1 - probability)
    first = write_store(tmp_path / "first", [[6, 7, SPECIAL.eos]], text_bytes=2, vocab_size=8)
    second = write_store(tmp_path / "second", [[6, 7, SPECIAL.eos], [6, 7, SPECIAL.eos]], text_bytes=8, vocab_size=8)
    options = {"sequence_length": 2, "batch_sequences": 2}
    scores = [score_store(bigram_loss(table), store, **options) for store in (first, second)]
    # 6 bits a document; perplexity 2 ** (6 / 3). Exact up to float64 sums of 9 terms.
    assert [score.bits_per_byte for score in scores] == pytest.approx([6 / 2, 12 / 8], rel=1e-14)
    assert [score.perplexity for score in scores] == pytest.approx([4, 4], rel=1e-14)
    total = total_score(scores)
    assert (total.bits_per_byte, total.tokens, total.text_bytes) == (pytest.approx(18 / 10, rel=1e-14), 9, 10)


def test_the_total_perplexity_weighs_a_domain_by_its_tokens() -> None:
    total = total_score([StoreScore(10 * math.log(2), 10, 5), StoreScore(30 * math.log(8), 30, 7)])
    # Ten tokens of one bit and thirty of three are 2.5 bits a token.
    assert total.perplexity == pytest.approx(2**2.5, rel=1e-14)
