"""Samples: epochs are permutations, fill-in-the-middle re-assembles, the stream is a function of (seed, position)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.handmade import SPECIAL, consecutive, write_store
from train.data.batch import IGNORE_INDEX, Batch
from train.data.config import DataConfig
from train.data.packing import (
    DOCUMENT_ORDER,
    WINDOW_ORDER,
    epoch_tokens,
    fim_choice,
    fim_cuts,
    fim_document,
    pack_epoch,
    packed_document,
    permutation,
    random_words,
    read_packed,
)
from train.data.store import TokenStore
from train.data.stream import TokenStream, iterate_windows
from train.data.windows import position_of, union

FIM_IDS = [SPECIAL.fim_begin, SPECIAL.fim_hole, SPECIAL.fim_end]


@pytest.fixture(scope="module")
def unique_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Eleven documents of 1 to 21 tokens, 121 in all, every token different: 10, 11, ... 130."""
    documents = consecutive([11, 1, 21, 3, 19, 5, 17, 7, 15, 9, 13])
    return write_store(tmp_path_factory.mktemp("unique") / "store", documents)


def unpack_fim(tokens: list[int]) -> list[int]:
    """Undo prefix-suffix-middle, written from the template alone."""
    assert tokens[0] == SPECIAL.fim_begin
    hole, end = tokens.index(SPECIAL.fim_hole), tokens.index(SPECIAL.fim_end)
    prefix, suffix, middle = tokens[1:hole], tokens[hole + 1 : end], tokens[end + 1 : -1]
    return [*prefix, *middle, *suffix, tokens[-1]]


def test_random_words_never_change() -> None:
    # Written down once with numpy 2.4.6; a run must find its order again whatever numpy it is resumed with.
    words = random_words(2, seed=7, purpose=DOCUMENT_ORDER, epoch=3, document=5)
    assert words.tolist() == [16049542384458479136, 8441319502719530144]
    assert permutation(8, seed=0, purpose=WINDOW_ORDER, epoch=0).tolist() == [7, 4, 2, 6, 5, 0, 1, 3]


def test_each_address_has_its_own_random_words() -> None:
    addresses = [(s, p, e, d) for s in (0, 1) for p in (0, 1, 2, 3) for e in (0, 1) for d in (0, 1)]
    words = {int(random_words(1, seed=s, purpose=p, epoch=e, document=d)[0]) for s, p, e, d in addresses}
    assert len(words) == len(addresses)


def test_fim_document_has_the_papers_order() -> None:
    tokens = np.array([20, 21, 22, 23, 24, SPECIAL.eos])
    begin, hole, end = FIM_IDS
    packed = fim_document(tokens, SPECIAL, cuts=(1, 3))
    assert packed.tolist() == [begin, 20, hole, 23, 24, end, 21, 22, SPECIAL.eos]


@given(st.lists(st.integers(10, 99), max_size=40), st.data())
def test_fim_document_reassembles_for_any_cuts(text: list[int], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    tokens = np.array([*text, SPECIAL.eos])
    packed = fim_document(tokens, SPECIAL, cuts=(cuts[0], cuts[1])).tolist()
    assert unpack_fim(packed) == tokens.tolist()
    assert len(packed) == len(tokens) + 3


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_fim_rate_is_binomial_and_epochs_are_independent(rate: float) -> None:
    documents = 20_000
    first, second = (fim_choice(documents, seed=1, epoch=epoch, rate=rate) for epoch in (0, 1))
    for chosen, probability in ((first, rate), (second, rate), (first & second, rate * rate)):
        # Five standard deviations of a binomial count: a right generator fails for one seed in 1.7 million.
        bound = 5 * math.sqrt(documents * probability * (1 - probability))
        assert abs(int(chosen.sum()) - documents * probability) < bound


@pytest.mark.parametrize("rate", [0, 1])
def test_fim_rate_zero_chooses_none_and_rate_one_all(rate: int) -> None:
    assert fim_choice(1000, seed=0, epoch=0, rate=rate).sum() == 1000 * rate


def test_fim_cuts_are_two_sorted_uniform_draws() -> None:
    length, documents = 300, 4000
    cuts = np.array([fim_cuts(length, seed=2, epoch=0, document=index) for index in range(documents)])
    assert np.all(cuts[:, 0] <= cuts[:, 1])
    assert cuts.min() >= 0
    assert cuts.max() <= length
    # Smaller and larger of two uniforms: means 1/3 and 2/3, variance 1/18; five standard errors.
    bound = 5 * math.sqrt(1 / 18 / documents)
    assert np.abs(cuts.mean(axis=0) / length - [1 / 3, 2 / 3]).max() < bound


def test_fim_cuts_depend_on_seed_epoch_and_document_only() -> None:
    addresses = [(2, 0, 4), (2, 0, 4), (3, 0, 4), (2, 1, 4), (2, 0, 5)]
    first, again, *others = (fim_cuts(10**6, seed=s, epoch=e, document=d) for s, e, d in addresses)
    assert first == again
    assert len({first, *others}) == 4


@pytest.mark.parametrize("length", [0, 2])
def test_a_middle_can_begin_and_end_anywhere(length: int) -> None:
    # 400 draws of two among {0, 1, 2}: each of the six outcomes has probability 1/9 or 2/9.
    found = {fim_cuts(length, seed=0, epoch=0, document=document) for document in range(400)}
    assert found == set(itertools.combinations_with_replacement(range(length + 1), 2))


def test_choice_and_cuts_belong_to_the_document_and_the_epoch(unique_store: TokenStore) -> None:
    longest = 2  # 20 tokens of text
    seen = set()
    for epoch in range(20):
        packing = pack_epoch(unique_store, seed=5, epoch=epoch, fim_rate=0.5)
        chosen = fim_choice(11, seed=5, epoch=epoch, rate=0.5)
        assert packing.is_fim.tolist() == chosen[packing.documents].tolist()
        if chosen[longest]:
            (ordinal,) = np.flatnonzero(packing.documents == longest)
            tokens = packed_document(unique_store, packing, int(ordinal)).tolist()
            begin, end = fim_cuts(20, seed=5, epoch=epoch, document=longest)
            assert tokens.index(SPECIAL.fim_hole) == 1 + begin
            assert len(tokens) - 1 - (tokens.index(SPECIAL.fim_end) + 1) == end - begin
            seen.add((begin, end))
    assert len(seen) > 1


def test_an_epoch_holds_every_document_once_and_fim_documents_reassemble(unique_store: TokenStore) -> None:
    originals = [unique_store.document(index).tolist() for index in range(11)]
    rearranged = 0
    for epoch in range(4):
        packing = pack_epoch(unique_store, seed=5, epoch=epoch, fim_rate=0.5)
        assert sorted(packing.documents.tolist()) == list(range(11))
        for ordinal, index in enumerate(packing.documents):
            tokens = packed_document(unique_store, packing, ordinal).tolist()
            if packing.is_fim[ordinal]:
                rearranged += 1
                tokens = unpack_fim(tokens)
            assert tokens == originals[index]
        assert packing.num_tokens == 121 + 3 * int(packing.is_fim.sum())
        assert packing.num_tokens == epoch_tokens(unique_store, seed=5, epoch=epoch, fim_rate=0.5)
    # 44 draws at 0.5: both kinds were seen.
    assert 0 < rearranged < 44


def test_epochs_and_seeds_shuffle_differently(unique_store: TokenStore) -> None:
    orders = {
        tuple(pack_epoch(unique_store, seed=seed, epoch=epoch, fim_rate=0.0).documents.tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4
    assert tuple(range(11)) not in orders


@given(st.integers(0, 1), st.integers(0, 140), st.integers(0, 160))
def test_any_span_is_a_slice_of_the_packed_epoch(unique_store: TokenStore, epoch: int, start: int, length: int) -> None:
    packing = pack_epoch(unique_store, seed=9, epoch=epoch, fim_rate=0.5)
    documents = [packed_document(unique_store, packing, ordinal) for ordinal in range(11)]
    whole = np.concatenate(documents)
    owner = np.repeat(np.arange(11), [len(document) for document in documents])
    tokens, ordinals = np.full(length, -7), np.full(length, -7)
    filled = read_packed(unique_store, packing, start, tokens=tokens, documents=ordinals)
    assert filled == len(whole[start : start + length])
    assert tokens[:filled].tolist() == whole[start : start + length].tolist()
    assert ordinals[:filled].tolist() == owner[start : start + length].tolist()
    assert np.all(tokens[filled:] == -7)


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
    stream = TokenStream(unique_store, config(), seed=3)
    # The second chunk first: what was read before must not matter.
    second, first = stream.take(position + left, right), stream.take(position, left)
    for expected, one, two in zip(fields(whole), fields(first), fields(second), strict=True):
        assert torch.equal(expected, torch.cat([one, two]))


def test_a_far_position_equals_the_one_reached_step_by_step(unique_store: TokenStore) -> None:
    walked = TokenStream(unique_store, config(), seed=3)
    for position in range(0, 300, 5):
        last = walked.take(position, 5)
    jumped = TokenStream(unique_store, config(), seed=3).take(295, 5)
    assert all(torch.equal(a, b) for a, b in zip(fields(last), fields(jumped), strict=True))
    # 295 samples of 7 tokens are more than 14 epochs of at most 121 + 33 tokens.
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
    # Documents end after 11, 12 and 33 tokens; one end-of-sentence token is before the first.
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


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=6))
def test_positions_of_a_run_are_those_outside_the_dropped_windows_in_order(windows: list[tuple[int, int]]) -> None:
    merged = union(windows)
    left_out = {position for first, count in windows for position in range(first, first + count)}
    assert {position for first, count in merged for position in range(first, first + count)} == left_out
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(merged)), "in order and apart"
    kept = [position for position in range(100) if position not in left_out]
    assert [position_of(sequence, merged) for sequence in range(40)] == kept[:40]


def test_a_stream_without_some_windows_is_the_stream_with_them_cut_out(unique_store: TokenStore) -> None:
    config = DataConfig(store=unique_store.path, sequence_length=8)
    whole = TokenStream(unique_store, config, seed=3).take(0, 20).input_ids
    stream = TokenStream(unique_store, config, seed=3, dropped=((2, 3), (9, 1)))
    kept = [position for position in range(20) if position not in (2, 3, 4, 9)]
    assert torch.equal(stream.take(0, 16).input_ids, whole[kept])
    assert torch.equal(stream.take(7, 4).input_ids, whole[kept[7:11]]), "the same whatever was taken before"
