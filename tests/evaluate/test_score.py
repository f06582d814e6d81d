"""Held-out bits per byte against figures that can be worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.data.handmade import SPECIAL, consecutive, write_store
from train.data.batch import IGNORE_INDEX, Batch
from train.data.store import TokenStore
from train.evaluate.score import bits_per_byte


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Three documents, 14 tokens, 40 bytes of text."""
    return write_store(tmp_path_factory.mktemp("score") / "s", consecutive([5, 1, 8]), text_bytes=40)


@pytest.mark.parametrize("sequence_length", [1, 4, 14, 100])
@pytest.mark.parametrize("batch_sequences", [1, 3])
def test_a_uniform_model_costs_its_vocabulary(store: TokenStore, sequence_length: int, batch_sequences: int) -> None:
    def uniform(batch: Batch) -> tuple[float, int]:
        logits = torch.zeros(batch.labels.numel(), 32, dtype=torch.float64)
        nats = torch.nn.functional.cross_entropy(
            logits, batch.labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX
        )
        return float(nats), batch.num_targets

    found = bits_per_byte(uniform, store, sequence_length=sequence_length, batch_sequences=batch_sequences)
    # 14 tokens of 5 bits over 40 bytes; float64 sums of 14 terms.
    assert found == pytest.approx(14 * 5 / 40, rel=1e-14)


def test_every_token_is_scored_once_after_the_token_before(store: TokenStore) -> None:
    pairs: list[tuple[int, int]] = []

    def remember(batch: Batch) -> tuple[float, int]:
        is_target = batch.labels != IGNORE_INDEX
        pairs.extend(zip(batch.input_ids[is_target].tolist(), batch.labels[is_target].tolist(), strict=True))
        return math.log(2), int(is_target.sum())

    # Four batches of one bit each.
    assert bits_per_byte(remember, store, sequence_length=4, batch_sequences=1) == 4 / 40
    tokens = list(range(10, 24))
    assert pairs == list(zip([SPECIAL.eos, *tokens[:-1]], tokens, strict=True))


def test_a_model_that_loses_targets_is_found_out(store: TokenStore) -> None:
    with pytest.raises(AssertionError):
        bits_per_byte(lambda batch: (0.0, 1), store, sequence_length=4, batch_sequences=1)


def test_a_non_finite_loss_stays_visible(store: TokenStore) -> None:
    def broken(batch: Batch) -> tuple[float, int]:
        return math.nan, batch.num_targets

    assert math.isnan(bits_per_byte(broken, store, sequence_length=4, batch_sequences=2))


def test_document_ids_reach_the_model_when_asked_for(tmp_path: Path, store: TokenStore) -> None:
    seen: list[bool] = []

    def look(batch: Batch) -> tuple[float, int]:
        seen.append(batch.document_ids is not None)
        return 0.0, batch.num_targets

    bits_per_byte(look, store, sequence_length=14, batch_sequences=1, mask_documents=True)
    bits_per_byte(look, store, sequence_length=14, batch_sequences=1)
    assert seen == [True, False]
