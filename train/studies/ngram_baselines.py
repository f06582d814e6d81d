"""What a model has to beat: unigram and bigram models of the same tokens, and xz on the same text.

Unigram, additive smoothing:          p(w)   = (c(w) + a) / (N + a V)
Bigram, interpolated Kneser-Ney:      p(w|h) = max(c(h,w) - D, 0) / c(h)  +  D n(h) / c(h) * q(w)
    with the continuation unigram     q(w)   = (m(w) + a) / (M + a V)

    c  counts in the training store;  N  its tokens;  V  the vocabulary
    n(h)  different tokens seen after h;  m(w)  different tokens seen before w;  M  different pairs

(Chen and Goodman 1998, "An empirical study of smoothing techniques for language modeling"; one discount.)
The discount D and the mass a are chosen on the last tenth of the *training* documents with counts of the
rest; then all training documents are counted. Nothing is fitted to held-out text.

xz:  8 * (size(xz(train + held-out)) - size(xz(train))) / bytes(held-out).  It pays nothing for document ends.

The question is whether a network uses more than the token before, so there are no higher orders.
Shapes: pairs = (context, target) positions of a store, vocab = ids, seen = different pairs of a store.
"""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.batch import IGNORE_INDEX, Batch
from train.data.store import MANIFEST_NAME, TokenStore, check_same_tokenizer
from train.data.tokenizer import load_tokenizer
from train.evaluate.score import score_store

Ids = NDArray[np.int64]
Probabilities = NDArray[np.float64]

DISCOUNTS = tuple(round(0.05 * step, 2) for step in range(1, 20))
ADDED_MASSES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

# How held-out text is cut makes no difference here: only the token before counts, and every target has it.
SEQUENCE_LENGTH, BATCH_SEQUENCES = 1024, 16
# Text of both stores that is measured without being asked for: xz takes a second a megabyte, twice.
UNASKED_BYTES = 32_000_000


@dataclass(frozen=True)
class Unigram:
    """Token frequencies with a little mass for the unseen."""

    counts: Ids  # [vocab] c(w)
    added_mass: float  # a

    def probabilities(self, contexts: Ids, targets: Ids) -> Probabilities:
        """[pairs] p(target); the context is ignored."""
        assert contexts.shape == targets.shape, (contexts.shape, targets.shape)
        total = self.counts.sum() + self.added_mass * len(self.counts)
        return np.asarray((self.counts[targets] + self.added_mass) / total)


@dataclass(frozen=True)
class Bigram:
    """Interpolated Kneser-Ney over pairs of tokens."""

    pairs: Ids  # [seen] sorted codes h * vocab + w
    pair_counts: Ids  # [seen] c(h, w)
    context_counts: Ids  # [vocab] c(h)
    followers: Ids  # [vocab] n(h)
    precursors: Ids  # [vocab] m(w)
    discount: float  # D
    added_mass: float  # a

    def probabilities(self, contexts: Ids, targets: Ids) -> Probabilities:
        """[pairs] p(target | context); the continuation unigram where the context was never seen."""
        vocab_size = len(self.precursors)
        codes = contexts * vocab_size + targets
        nearest = np.minimum(np.searchsorted(self.pairs, codes), len(self.pairs) - 1)
        counts = np.where(self.pairs[nearest] == codes, self.pair_counts[nearest], 0)
        total = self.context_counts[contexts]
        left_over = np.where(total > 0, self.discount * self.followers[contexts] / np.maximum(total, 1), 1.0)
        continuation = (self.precursors[targets] + self.added_mass) / (len(self.pairs) + self.added_mass * vocab_size)
        seen_part = np.maximum(counts - self.discount, 0.0) / np.maximum(total, 1)
        return np.asarray(seen_part + left_over * continuation)


def fit_unigram(targets: Ids, *, vocab_size: int, added_mass: float) -> Unigram:
    """Count [pairs] training tokens; `added_mass` is a."""
    return Unigram(np.bincount(targets, minlength=vocab_size), added_mass)


def fit_bigram(contexts: Ids, targets: Ids, *, vocab_size: int, discount: float, added_mass: float) -> Bigram:
    """Count [pairs] training tokens and the token after each; `discount` is D, `added_mass` a."""
    pairs, pair_counts = np.unique(contexts * vocab_size + targets, return_counts=True)
    return Bigram(
        pairs=pairs,
        pair_counts=pair_counts,
        context_counts=np.bincount(contexts, minlength=vocab_size),
        followers=np.bincount(pairs // vocab_size, minlength=vocab_size),
        precursors=np.bincount(pairs % vocab_size, minlength=vocab_size),
        discount=discount,
        added_mass=added_mass,
    )


def pairs_of(store: TokenStore, documents: range) -> tuple[Ids, Ids]:
    """Contexts and targets of some documents: each begins after an end-of-sentence token."""
    eos = store.manifest.special_ids.eos
    tokens = np.concatenate([[eos], *(store.document(index) for index in documents)]).astype(np.int64)
    return tokens[:-1], tokens[1:]


def _slices(store: TokenStore) -> tuple[range, range]:
    # Training documents to count, and to choose the parameters on.
    documents = len(store.lengths)
    if documents < 2:
        raise ValueError(
            f"store: {store.path} holds {documents} document; the n-gram baselines need 2 or more "
            "(one to count, one to choose their parameters on)"
        )
    counted = min(documents - 1, round(0.9 * documents))
    return range(counted), range(counted, documents)


def _nats(model: Unigram | Bigram, contexts: Ids, targets: Ids) -> float:
    return float(-np.log(model.probabilities(contexts, targets)).sum())


def train_unigram(store: TokenStore) -> Unigram:
    """The unigram model of a training store, its added mass chosen on the store's last tenth."""
    counted, chosen_on = _slices(store)
    vocab_size = store.manifest.vocab_size
    (_, seen), unseen = pairs_of(store, counted), pairs_of(store, chosen_on)
    first = fit_unigram(seen, vocab_size=vocab_size, added_mass=ADDED_MASSES[0])
    mass = min(ADDED_MASSES, key=lambda mass: _nats(replace(first, added_mass=mass), *unseen))
    _, everything = pairs_of(store, range(len(store.lengths)))
    return fit_unigram(everything, vocab_size=vocab_size, added_mass=mass)


def train_bigram(store: TokenStore) -> Bigram:
    """The bigram model of a training store, discount and added mass chosen on the store's last tenth."""
    counted, chosen_on = _slices(store)
    vocab_size = store.manifest.vocab_size
    seen, unseen = pairs_of(store, counted), pairs_of(store, chosen_on)
    first = fit_bigram(*seen, vocab_size=vocab_size, discount=DISCOUNTS[0], added_mass=ADDED_MASSES[0])
    discount, mass = min(
        product(DISCOUNTS, ADDED_MASSES),
        key=lambda choice: _nats(replace(first, discount=choice[0], added_mass=choice[1]), *unseen),
    )
    everything = pairs_of(store, range(len(store.lengths)))
    return fit_bigram(*everything, vocab_size=vocab_size, discount=discount, added_mass=mass)


def ngram_bits_per_byte(model: Unigram | Bigram, store: TokenStore) -> float:
    """Score an n-gram model on a held-out store, on exactly the targets that a neural model is scored on."""

    def loss_of_batch(batch: Batch) -> tuple[float, int]:
        labels = batch.labels.flatten().numpy()
        is_target = labels != IGNORE_INDEX
        nats = _nats(model, batch.input_ids.flatten().numpy()[is_target], labels[is_target])
        return nats, int(is_target.sum())

    score = score_store(loss_of_batch, store, sequence_length=SEQUENCE_LENGTH, batch_sequences=BATCH_SEQUENCES)
    return score.bits_per_byte


def store_text(store: TokenStore) -> bytes:
    """The text of a store, documents end to end: exactly `manifest.text_bytes` bytes."""
    tokenizer = load_tokenizer(store.tokenizer_path)
    documents = (store.document(index)[:-1].tolist() for index in range(len(store.lengths)))
    text = "".join(tokenizer.decode(ids) for ids in documents).encode()
    if len(text) != store.manifest.text_bytes:
        raise ValueError(
            f"store: the tokeniser of {store.path} does not give back its text ({len(text)} bytes of "
            f"{store.manifest.text_bytes}), so xz has nothing to compress"
        )
    return text


def xz_bits_per_byte(train: bytes, heldout: bytes) -> float:
    """Bits per byte that xz needs for held-out text once it has seen the training text."""
    # The dictionary must reach back over everything; xz takes 4 KiB at least.
    dictionary_bytes = max(4096, len(train) + len(heldout))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary_bytes}]
    both, alone = (len(lzma.compress(text, filters=filters)) for text in (train + heldout, train))
    return 8 * (both - alone) / len(heldout)


@dataclass(frozen=True)
class Baselines:
    """Held-out bits per byte of the baselines."""

    unigram: float
    bigram: float
    xz: float


def measure_baselines(store: TokenStore, heldout: TokenStore) -> Baselines:
    """All baselines of a training and a held-out store; for texts that fit in memory."""
    return Baselines(
        unigram=ngram_bits_per_byte(train_unigram(store), heldout),
        bigram=ngram_bits_per_byte(train_bigram(store), heldout),
        xz=xz_bits_per_byte(store_text(store), store_text(heldout)),
    )


def open_beside(heldout: Mapping[str, Path], learn_from: Path | None) -> dict[str, tuple[TokenStore, TokenStore] | str]:
    """Held-out stores by name -> what their baselines learn from and they, or why there are none.

    `learn_from` is for all of them; None takes the store `train` beside each.
    Raises:
        ValueError: a store cannot be opened, or `learn_from` has another tokeniser.
    """
    found: dict[str, tuple[TokenStore, TokenStore] | str] = {}
    for name, path in heldout.items():
        store, place = TokenStore.open(path), learn_from or path.parent / "train"
        if store.manifest.chat is not None:
            found[name] = "it holds conversations, of which a part is scored, and these figures are of whole texts"
            continue
        if learn_from is None and (place.resolve() == path.resolve() or not (place / MANIFEST_NAME).exists()):
            found[name] = f"no store `train` is beside {path}; name the one to learn from with --learn-from"
            continue
        try:
            train = TokenStore.open(place)
            check_same_tokenizer(train, store)
            found[name] = train, store
        except ValueError as error:
            if learn_from is not None:
                raise
            found[name] = str(error)
    return found


def measure_beside(pair: tuple[TokenStore, TokenStore] | str, *, asked: bool) -> dict[str, object]:
    """Figures of the baselines for a report, with "learn_from"; {"left_out": why} where there are none.

    Without being `asked` for, only what takes about a minute is measured.
    """
    if isinstance(pair, str):
        return {"left_out": pair}
    text_bytes = sum(store.manifest.text_bytes for store in pair)
    if text_bytes > UNASKED_BYTES and not asked:
        return {"left_out": f"{text_bytes / 1e6:.0f} MB of text take minutes; --baselines measures them all the same"}
    try:
        return {**vars(measure_baselines(*pair)), "learn_from": str(pair[0].path)}
    except ValueError as error:
        return {"left_out": str(error)}
