"""TokenStream: a pure function of (seed, position) in which every token is a target exactly once an epoch."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.handmade import SPECIAL, consecutive, write_store
from train.data.batch import IGNORE_INDEX, Batch
from train.data.store import TokenStore
from train.data.stream import DataConfig, TokenStream, iterate_windows


def config(sequence_length: int = 7, *, fim_rate: float = 0.5, mask_documents: bool = True) -> DataConfig:
    return DataConfig(store="s", sequence_length=sequence_length, fim_rate=fim_rate, mask_documents=mask_documents)


def fields(batch: Batch) -> list[torch.Tensor]:
    assert batch.document_ids is not None
    return [batch.input_ids, batch.labels, batch.document_ids]


@given(st.integers(0, 60), st.integers(0, 9), st.integers(0, 9))
def test_order_is_the_same_whatever_the_chunking(
    unique_store: TokenStore, position: int, left: int, right: int
) -> None:
    whole = TokenStream(unique_store, config(), seed=3).take(position, left + right)
    pieces = TokenStream(unique_store, config(), seed=3)
    # The second piece first: what was read before must not matter.
    second, first = pieces.take(position + left, right), pieces.take(position, left)
    for expected, one, two in zip(fields(whole), fields(first), fields(second), strict=True):
        assert torch.equal(expected, torch.cat([one, two]))


def test_a_far_position_equals_the_one_reached_step_by_step(unique_store: TokenStore) -> None:
    walked = TokenStream(unique_store, config(), seed=3)
    for position in range(0, 300, 5):
        last = walked.take(position, 5)
    jumped = TokenStream(unique_store, config(), seed=3).take(295, 5)
    assert all(torch.equal(a, b) for a, b in zip(fields(last), fields(jumped), strict=True))
    # 295 samples of 7 tokens lie beyond 14 epochs of at most 121 + 33 tokens.
    assert walked.epoch_of(295) >= 13


@pytest.mark.parametrize("sequence_length", [1, 7, 11, 121])
def test_every_token_is_a_target_exactly_once_an_epoch(unique_store: TokenStore, sequence_length: int) -> None:
    # sequence_length epochs of 121 tokens are 121 samples, whatever the length.
    stream = TokenStream(unique_store, config(sequence_length, fim_rate=0.0), seed=4)
    labels = stream.take(0, 121).labels.flatten()
    counts = torch.bincount(labels, minlength=131)
    assert counts[10:].tolist() == [sequence_length] * 121
    assert counts[:10].sum() == 0


def test_with_fim_every_text_token_is_still_a_target_once(unique_store: TokenStore) -> None:
    stream = TokenStream(unique_store, config(1, fim_rate=0.5), seed=4)
    samples = next(n for n in range(1, 1000) if stream.epoch_of(n) == 1)
    labels = stream.take(0, samples).labels.flatten()
    counts = torch.bincount(labels, minlength=131)
    assert counts[10:].tolist() == [1] * 121
    marks = counts[[SPECIAL.fim_begin, SPECIAL.fim_hole, SPECIAL.fim_end]].tolist()
    assert marks[0] == marks[1] == marks[2] == (samples - 121) // 3
    assert marks[0] > 0


def test_each_target_follows_its_input_in_the_document(unique_store: TokenStore) -> None:
    documents = [unique_store.document(index).tolist() for index in range(11)]
    before = {b: a for document in documents for a, b in itertools.pairwise(document)}
    ends = {document[-1] for document in documents} | {SPECIAL.eos}
    batch = TokenStream(unique_store, config(fim_rate=0.0), seed=6).take(0, 40)
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    for context, target in zip(batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist(), strict=True):
        assert context == before[target] if target in before else context in ends


def test_samples_of_an_epoch_are_shuffled_and_reshuffled(unique_store: TokenStore) -> None:
    # Samples of one token: unshuffled, 110 of the 120 neighbours inside documents would stay together.
    stream = TokenStream(unique_store, config(1, fim_rate=0.0, mask_documents=False), seed=6)
    first, second = (stream.take(121 * epoch, 121).labels.flatten().tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10, 131))
    assert first != second
    # A random order of 121 keeps one neighbour in place on average (Poisson: 10 or more once in 10 million).
    assert sum(b == a + 1 for a, b in itertools.pairwise(first)) < 10


def test_samples_of_one_document_are_reshuffled_every_epoch(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", consecutive([50]))
    stream = TokenStream(store, config(1, fim_rate=0.0, mask_documents=False), seed=6)
    orders = {tuple(stream.take(50 * epoch, 50).labels.flatten().tolist()) for epoch in range(3)}
    assert len(orders) == 3
    assert all(sorted(order) == list(range(10, 60)) for order in orders)


def test_seeds_give_different_orders(unique_store: TokenStore) -> None:
    one, two = (TokenStream(unique_store, config(), seed=seed).take(0, 8).labels for seed in (0, 1))
    assert not torch.equal(one, two)


def test_document_ids_count_documents_inside_the_window(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", consecutive([4] * 9))
    batch = TokenStream(store, config(10, fim_rate=0.0), seed=1).take(0, 30)
    assert batch.document_ids is not None
    ends = set(range(13, 46, 4)) | {SPECIAL.eos}
    for row, ids in zip(batch.input_ids.tolist(), batch.document_ids.tolist(), strict=True):
        expected = [0]
        for token in row[:-1]:
            expected.append(expected[-1] + (token in ends))
        assert ids == expected


def test_without_masking_there_are_no_document_ids(unique_store: TokenStore) -> None:
    assert TokenStream(unique_store, config(mask_documents=False), seed=0).take(0, 2).document_ids is None


def test_a_batch_of_nothing_is_legal(unique_store: TokenStore) -> None:
    batch = TokenStream(unique_store, config(), seed=0).take(5, 0)
    assert batch.input_ids.shape == (0, 7)
    assert batch.num_targets == 0


@given(st.integers(1, 130), st.integers(1, 6))
def test_evaluation_scores_every_token_once_in_order(
    unique_store: TokenStore, sequence_length: int, batch_sequences: int
) -> None:
    batches = list(iterate_windows(unique_store, sequence_length=sequence_length, batch_sequences=batch_sequences))
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    inputs = torch.cat([batch.input_ids.flatten() for batch in batches])
    assert labels[:121].tolist() == list(range(10, 131))
    assert inputs[:121].tolist() == [SPECIAL.eos, *range(10, 130)]
    assert torch.all(labels[121:] == IGNORE_INDEX)
    assert len(labels) - 121 < sequence_length
    assert sum(batch.num_targets for batch in batches) == 121
    assert all(len(batch.labels) == batch_sequences for batch in batches[:-1])


def test_evaluation_can_mask_documents(unique_store: TokenStore) -> None:
    (batch,) = iterate_windows(unique_store, sequence_length=20, batch_sequences=99, mask_documents=True)
    assert batch.document_ids is not None
    # Documents end after 11, 12 and 33 tokens; one end-of-sentence token stands before the first.
    assert batch.document_ids[0].tolist() == [0] + [1] * 11 + [2] + [3] * 7
    assert batch.document_ids[1].tolist() == [0] * 14 + [1] * 3 + [2] * 3


def test_a_store_shorter_than_a_sample_is_refused(unique_store: TokenStore) -> None:
    TokenStream(unique_store, config(121), seed=0)
    with pytest.raises(ValueError, match=r"121 tokens, fewer than one sample of data.sequence_length 122"):
        TokenStream(unique_store, config(122), seed=0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(unique_store: TokenStore, seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed: {seed} is out of range"):
        TokenStream(unique_store, config(), seed=seed)


def test_bad_config_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data.sequence_length: 0 is not positive"):
        config(0)
    with pytest.raises(ValueError, match=r"data.fim_rate: 1.5 is not a share"):
        config(fim_rate=1.5)
