"""n-gram and xz baselines against fractions worked out by hand and against the definition, token by token."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from tests.data.handmade import SPECIAL, write_store
from train.data.ingest import Prepared, Recipe, prepare
from train.data.store import TokenStore
from train.studies import ngram_baselines as ngram
from train.studies.ngram_baselines import Bigram, Unigram, fit_bigram, fit_unigram, ngram_bits_per_byte, train_bigram

# A toy language over four ids; c(0,1)=3, c(0,2)=1, c(1,0)=2, c(2,0)=1; 3 is never seen.
CONTEXTS = np.array([0, 0, 0, 0, 1, 1, 2])
TARGETS = np.array([1, 1, 1, 2, 0, 0, 0])

# Sums of at most 2048 float64 terms below 1.
EXACT = 1e-12


@pytest.fixture
def bigram() -> Bigram:
    return fit_bigram(CONTEXTS, TARGETS, vocab_size=4, discount=0.5, added_mass=0.25)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Stores of a made-up language in which the next word depends on the last one."""
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("baselines")
    draw = random.Random(5)
    words = [f"w{n}" for n in range(30)]
    follows = {word: draw.sample(words, 4) for word in words}
    texts = []
    for _ in range(60):
        text = [draw.choice(words)]
        while len(text) < 120:
            text.append(draw.choice(follows[text[-1]]))
        texts.append(" ".join(text) + " ä")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare(Recipe(source=str(folder / "text.jsonl"), vocab_size=320), folder / "out")


def all_probabilities(model: Unigram | Bigram, vocab_size: int) -> np.ndarray:
    contexts, targets = np.divmod(np.arange(vocab_size**2), vocab_size)
    return model.probabilities(contexts, targets).reshape(vocab_size, vocab_size)


def test_unigram_equals_the_hand_computed_fractions() -> None:
    model = fit_unigram(TARGETS, vocab_size=4, added_mass=0.25)
    found = model.probabilities(np.zeros(4, dtype=np.int64), np.arange(4))
    # (c + 1/4) / (7 + 1) for counts 3, 3, 1, 0.
    assert found == pytest.approx([3.25 / 8, 3.25 / 8, 1.25 / 8, 0.25 / 8], abs=EXACT)


def test_bigram_equals_the_hand_computed_fractions(bigram: Bigram) -> None:
    # Four different pairs; tokens 0, 1, 2, 3 were seen after 2, 1, 1, 0 others: q = (m + 1/4) / (4 + 1).
    q = np.array([2.25, 1.25, 1.25, 0.25]) / 5
    expected = [
        np.array([0, 2.5, 0.5, 0]) / 4 + 0.5 * 2 / 4 * q,  # c(0) = 4, two followers
        np.array([1.5, 0, 0, 0]) / 2 + 0.5 * 1 / 2 * q,  # c(1) = 2, one follower
        np.array([0.5, 0, 0, 0]) / 1 + 0.5 * 1 / 1 * q,  # c(2) = 1, one follower
        q,  # never seen: the continuation unigram
    ]
    assert all_probabilities(bigram, 4) == pytest.approx(np.array(expected), abs=EXACT)


@pytest.mark.parametrize("discount", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("mass", [0.01, 3.0])
def test_probabilities_sum_to_one_after_every_context(discount: float, mass: float) -> None:
    draw = np.random.default_rng(0)
    tokens = np.minimum(draw.geometric(0.05, size=2000), 60)  # ids 61 to 69 stay unseen
    model = fit_bigram(tokens[:-1], tokens[1:], vocab_size=70, discount=discount, added_mass=mass)
    assert np.abs(all_probabilities(model, 70).sum(axis=1) - 1).max() < EXACT
    unigram = fit_unigram(tokens[1:], vocab_size=70, added_mass=mass)
    assert np.abs(all_probabilities(unigram, 70).sum(axis=1) - 1).max() < EXACT


def test_pairs_begin_after_an_end_of_sentence(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [[7, 8, 1], [9, 1], [6, 1]])
    contexts, targets = ngram.pairs_of(store, range(3))
    assert contexts.tolist() == [SPECIAL.eos, 7, 8, 1, 9, 1, 6]
    assert targets.tolist() == [7, 8, 1, 9, 1, 6, 1]
    # A slice begins as the whole does.
    assert ngram.pairs_of(store, range(1, 2))[0].tolist() == [SPECIAL.eos, 9]


def test_bits_per_byte_equals_the_definition_token_by_token(prepared: Prepared) -> None:
    model, heldout = train_bigram(prepared.train), prepared.heldout
    vocab_size = heldout.manifest.vocab_size
    count: Counter[tuple[int, int]] = Counter()
    for index in range(len(prepared.train.lengths)):
        document = [SPECIAL.eos, *prepared.train.document(index).tolist()]
        count.update(itertools.pairwise(document))
    after, before, total = Counter(h for h, _ in count), Counter(w for _, w in count), Counter[int]()
    for (h, _), n in count.items():
        total[h] += n
    bits = 0.0
    for index in range(len(heldout.lengths)):
        context = SPECIAL.eos
        for target in heldout.document(index).tolist():
            q = (before[target] + model.added_mass) / (len(count) + model.added_mass * vocab_size)
            p = q
            if total[context]:
                p = max(count[context, target] - model.discount, 0) / total[context]
                p += model.discount * after[context] / total[context] * q
            bits -= math.log2(p)
            context = target
    # float64 sums over some thousand tokens in another order.
    assert ngram_bits_per_byte(model, heldout) == pytest.approx(bits / heldout.manifest.text_bytes, rel=1e-11)


def test_parameters_are_the_best_on_the_last_tenth_of_training(prepared: Prepared) -> None:
    documents = len(prepared.train.lengths)
    seen, unseen = (ngram.pairs_of(prepared.train, r) for r in (range(49), range(49, documents)))
    vocab_size = prepared.train.manifest.vocab_size

    def cost(discount: float, mass: float) -> float:
        model = fit_bigram(*seen, vocab_size=vocab_size, discount=discount, added_mass=mass)
        return float(-np.log(model.probabilities(*unseen)).sum())

    assert documents == 54
    best = min((cost(d, a), d, a) for d in ngram.DISCOUNTS[::3] for a in ngram.ADDED_MASSES)
    chosen = train_bigram(prepared.train)
    assert cost(chosen.discount, chosen.added_mass) <= best[0]
    # Counts are those of all training documents, not of the part the parameters were chosen with.
    assert chosen.pair_counts.sum() == prepared.train.manifest.tokens
    assert ngram.train_unigram(prepared.train).counts.sum() == prepared.train.manifest.tokens


def test_baselines_are_ordered_as_the_language_is(prepared: Prepared) -> None:
    found = ngram.measure_baselines(prepared.train, prepared.heldout)
    assert found.bigram < found.unigram
    assert found.xz == ngram.xz_bits_per_byte(ngram.store_text(prepared.train), ngram.store_text(prepared.heldout))
    # No model that knows only frequencies gets below the entropy of one choice in four, 2 bits a word.
    words = 120 * len(prepared.heldout.lengths)
    assert found.bigram > 2 * words / prepared.heldout.manifest.text_bytes


def test_a_worse_discount_scores_worse(prepared: Prepared) -> None:
    model = train_bigram(prepared.train)
    spoilt = replace(model, added_mass=1000.0, discount=0.95)
    assert ngram_bits_per_byte(spoilt, prepared.heldout) > ngram_bits_per_byte(model, prepared.heldout)


def test_store_text_is_the_text(prepared: Prepared) -> None:
    source = Path(prepared.train.path).parent.parent / "text.jsonl"
    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    found = ngram.store_text(prepared.train)
    assert found == "".join(texts[:54]).encode()
    assert len(found) == prepared.train.manifest.text_bytes


def test_one_document_is_too_few_for_a_baseline(tmp_path: Path) -> None:
    store: TokenStore = write_store(tmp_path / "s", [[7, 8, 1]])
    with pytest.raises(ValueError, match="holds 1 document; the n-gram baselines need 2 or more"):
        ngram.train_unigram(store)


def test_xz_pays_nearly_nothing_for_what_it_has_seen_and_all_for_noise() -> None:
    noise = random.Random(1).randbytes(300_000)
    # A repeat costs a few matches of 273 bytes; 300 kB back is beyond the smallest dictionary of 4 kB.
    assert 0 <= ngram.xz_bits_per_byte(noise[:250_000], noise[:20_000]) < 0.2
    # Noise cannot be compressed; xz adds 0.01 %.
    assert ngram.xz_bits_per_byte(noise[:250_000], noise[250_000:]) == pytest.approx(8, rel=1e-3)
