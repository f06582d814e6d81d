"""Packing: epochs are permutations, fill-in-the-middle re-assembles, spans are slices of the whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.handmade import SPECIAL
from train.data.packing import (
    DOCUMENT_ORDER,
    WINDOW_ORDER,
    epoch_tokens,
    fim_choice,
    fim_cuts,
    fim_document,
    pack_epoch,
    pack_in_order,
    packed_document,
    permutation,
    random_words,
    read_packed,
)
from train.data.store import TokenStore

FIM_IDS = [SPECIAL.fim_begin, SPECIAL.fim_hole, SPECIAL.fim_end]


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


def test_fim_rate_zero_chooses_none_and_rate_one_all() -> None:
    assert fim_choice(1000, seed=0, epoch=0, rate=0.0).sum() == 0
    assert fim_choice(1000, seed=0, epoch=0, rate=1.0).sum() == 1000


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
    base = fim_cuts(10**6, seed=2, epoch=0, document=4)
    assert base == fim_cuts(10**6, seed=2, epoch=0, document=4)
    others = [
        fim_cuts(10**6, seed=3, epoch=0, document=4),
        fim_cuts(10**6, seed=2, epoch=1, document=4),
        fim_cuts(10**6, seed=2, epoch=0, document=5),
    ]
    assert len({base, *others}) == 4


def test_a_middle_can_begin_and_end_anywhere() -> None:
    # 400 draws of two among {0, 1, 2}: each of the six outcomes has probability 1/9 or 2/9.
    found = {fim_cuts(2, seed=0, epoch=0, document=document) for document in range(400)}
    assert found == {(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)}


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


def test_cuts_of_a_document_without_text_are_empty() -> None:
    assert fim_cuts(0, seed=0, epoch=0, document=0) == (0, 0)


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


def test_pack_in_order_is_the_store_end_to_end(unique_store: TokenStore) -> None:
    tokens, ordinals = np.empty(121, dtype=np.int64), np.empty(121, dtype=np.int64)
    read_packed(unique_store, pack_in_order(unique_store), 0, tokens=tokens, documents=ordinals)
    assert tokens.tolist() == list(range(10, 131))
