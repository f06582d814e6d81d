"""Token generation for a batch of prompts, with MTP drafting (arXiv:2412.19437 §2.2, §5.4.3).

One round for all sequences that are not done, each with tokens t_0 .. t_L of which t_0 .. t_{L-1} are in the cache:

    verify   the main model reads t_L and the drafts of t_{L+1} .. t_{L+d} in one pass (the first time, the prompt);
             the drafts that stand and one token more are the sequence's new tokens (`sampling.verify`)
    draft    MTP depth 1 reads the hidden states that the pass confirmed, each with the token after it, and drafts one
             token; depth k reads depth k-1's with the tokens k ahead, drafts among them, and drafts the next

Drafts that fell are placed over in the cache by the next pass. An entry of depth k at position i holds token i + k, so
its last k-1 entries of a round may hold drafts: each round computes the D-1 positions before its own once more.

Every sequence draws from its own stream of numbers: its tokens do not depend on its company, but for roundings of
the logits. With drafting on, the numbers are used up otherwise: the same distribution, another sample.

Shapes: as in `train/generate/latent_cache.py`. Not here: text (`generate_text.py`), many processes, beams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from train.generate.latent_cache import Decoder, LatentCache, Span
from train.generate.sampling import Sampling, draw, probabilities, verify
from train.model.config import ModelConfig

Reason = Literal["eos", "max_tokens", "max_position_embeddings"]
# Told the index of a sequence and its new tokens, end-of-sentence included, as soon as they stand.
OnTokens = Callable[[int, list[int]], None]


@dataclass(frozen=True)
class Request:
    """What to continue.

    Args:
        prompt_ids: at least one token; a document begins with end-of-sentence (`train/data/stream.py`).
        max_tokens: at most so many new ones.
        seed: of the sequence's own stream of numbers.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What came of a request.

    Args:
        ids: the new tokens; the last is end-of-sentence if `reason` says so.
        reason: why it ends.
        drafted: drafts that the main model has looked at.
        accepted: those of them that stood.
        passes: of the main model, after the prompt's.
    """

    ids: tuple[int, ...]
    reason: Reason
    drafted: int
    accepted: int
    passes: int


@dataclass
class _Sequence:
    """A request under way. `cached` counts the positions whose main entries stand: always len(ids) - 1 after a pass."""

    row: int
    ids: list[int]
    prompt_tokens: int
    limit: int
    uniforms: torch.Generator
    cached: int = 0
    drafts: list[int] = field(default_factory=list)
    proposed: list[Tensor] = field(default_factory=list)
    # [positions, hidden] of the main model: new ones of the last pass, and the D-1 before them.
    fresh: Tensor | None = None
    reason: Reason | None = None
    drafted: int = 0
    accepted: int = 0
    passes: int = -1

    def uniform(self) -> float:
        """The next number of the stream, in [0, 1)."""
        return float(torch.rand((), dtype=torch.float64, generator=self.uniforms))

    @property
    def left(self) -> int:
        """Tokens it may still add."""
        return self.limit - (len(self.ids) - self.prompt_tokens)


def generate(
    decoder: Decoder,
    requests: Sequence[Request],
    *,
    sampling: Sampling,
    eos: int | None,
    drafting: bool,
    on_tokens: OnTokens | None = None,
) -> list[Completion]:
    """Continue all prompts together.

    Args:
        decoder: the model.
        requests: prompts of any lengths.
        sampling: how tokens are chosen.
        eos: the token that ends a sequence; None: nothing does.
        drafting: let the MTP chain draft.
        on_tokens: told of new tokens at once.
    Returns:
        One Completion per request, in their order.
    Raises:
        ValueError: a prompt is empty, too long, or not of this vocabulary; no new tokens are asked for; the seed is
            out of range; the model has no MTP layers to draft with.
    """
    if drafting and not decoder.depths:
        raise ValueError(
            "drafting needs MTP layers, and this model has none (num_nextn_predict_layers=0): use --no-draft"
        )
    for request in requests:
        _check(request, decoder.config)
    sequences = [_begin(row, request, decoder.config) for row, request in enumerate(requests)]
    if not sequences:
        return []
    slots = max(sequence.prompt_tokens + sequence.limit for sequence in sequences)
    cache = decoder.new_cache(sequences=len(sequences), slots=slots, drafting=drafting)
    asked = [request.max_tokens for request in requests]
    active = sequences
    while active:
        for sequence, new_ids in zip(active, _verify(decoder, cache, active, sampling), strict=True):
            added = _add(sequence, new_ids, eos, cut_by_model=sequence.limit < asked[sequence.row])
            if on_tokens is not None:
                on_tokens(sequence.row, added)
        active = [sequence for sequence in active if sequence.reason is None]
        if drafting:
            _draft(decoder, cache, active, sampling)
    return [_complete(sequence) for sequence in sequences]


def batches_of(requests: Sequence[Request], batch_tokens: int, positions: int) -> Iterator[range]:
    """Consecutive requests that are continued together; a single one may be larger than a batch.

    Args:
        requests: in order.
        batch_tokens: positions of the caches of a batch, each as long as the longest.
        positions: of the model; a sequence ends there, whatever is asked for.
    """
    first, longest = 0, 0
    for index, request in enumerate(requests):
        slots = min(len(request.prompt_ids) + request.max_tokens, positions)
        if index > first and (index - first + 1) * max(longest, slots) > batch_tokens:
            yield range(first, index)
            first, longest = index, 0
        longest = max(longest, slots)
    if requests:
        yield range(first, len(requests))


def generate_in_batches(
    decoder: Decoder,
    requests: Sequence[Request],
    *,
    batch_tokens: int,
    sampling: Sampling,
    eos: int | None,
    drafting: bool,
    on_tokens: OnTokens | None = None,
) -> list[Completion]:
    """`generate`, as many requests at a time as fit into caches of `batch_tokens` positions.

    Raises:
        ValueError: as `generate`, of any request, before the first pass; `batch_tokens` is not positive.
    """
    if batch_tokens < 1:
        raise ValueError(f"--batch-tokens {batch_tokens} must be 1 or more")
    for request in requests:
        _check(request, decoder.config)
    done: list[Completion] = []
    for batch in batches_of(requests, batch_tokens, decoder.config.max_position_embeddings):

        def told(index: int, ids: list[int], first: int = batch.start) -> None:
            assert on_tokens is not None
            on_tokens(first + index, ids)

        done += generate(
            decoder,
            requests[batch.start : batch.stop],
            sampling=sampling,
            eos=eos,
            drafting=drafting,
            on_tokens=told if on_tokens else None,
        )
    return done


def _check(request: Request, config: ModelConfig) -> None:
    ids, positions = request.prompt_ids, config.max_position_embeddings
    if not ids:
        raise ValueError("a prompt has no token: begin with end-of-sentence, as documents of a store do")
    if not all(0 <= token < config.vocab_size for token in ids):
        raise ValueError(
            f"a prompt holds token {max(ids)}, the model knows ids below {config.vocab_size}: it has another tokeniser"
        )
    if len(ids) >= positions:
        raise ValueError(
            f"a prompt of {len(ids)} tokens leaves no room: the model has {positions} positions "
            "(max_position_embeddings); shorten it"
        )
    if request.max_tokens < 1:
        raise ValueError(f"max_tokens: {request.max_tokens} must be at least 1")
    if not 0 <= request.seed < 2**63:
        raise ValueError(f"seed: {request.seed} must be in 0 .. 2^63 - 1")


def _begin(row: int, request: Request, config: ModelConfig) -> _Sequence:
    prompt_tokens = len(request.prompt_ids)
    return _Sequence(
        row=row,
        ids=list(request.prompt_ids),
        prompt_tokens=prompt_tokens,
        limit=min(request.max_tokens, config.max_position_embeddings - prompt_tokens),
        uniforms=torch.Generator().manual_seed(_stream(request.seed)),
    )


def _stream(seed: int) -> int:
    """torch's CPU generator reads the low 32 bits of a seed; larger ones are hashed, so that all bits tell."""
    return seed if seed < 2**32 else int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")


def _verify(decoder: Decoder, cache: LatentCache, active: Sequence[_Sequence], sampling: Sampling) -> list[list[int]]:
    """One pass of the main model over what is not cached and the drafts; the new tokens of each sequence."""
    given = [[*sequence.ids[sequence.cached :], *sequence.drafts] for sequence in active]
    spans = [Span(s.row, s.cached, len(ids)) for s, ids in zip(active, given, strict=True)]
    hidden = decoder.advance([token for ids in given for token in ids], spans, cache)
    parts = hidden.split([span.num_tokens for span in spans])
    # The last known token and every draft predict; the rest of a prompt does not.
    predicting = [len(sequence.drafts) + 1 for sequence in active]
    with torch.no_grad():
        last = torch.cat([part[-count:] for part, count in zip(parts, predicting, strict=True)])
        wanted = probabilities(decoder.model.logits(last), sampling).split(predicting)
    results = []
    for sequence, part, p in zip(active, parts, wanted, strict=True):
        new_ids = verify(sequence.drafts, sequence.proposed, p, sequence.uniform)
        confirmed = len(part) - len(sequence.drafts) + len(new_ids) - 1
        behind = (
            sequence.fresh[max(0, len(sequence.fresh) - decoder.depths + 1) :]
            if sequence.fresh is not None
            else part[:0]
        )
        sequence.fresh = torch.cat((behind, part[:confirmed]))
        sequence.cached += confirmed
        sequence.drafted += len(sequence.drafts)
        sequence.accepted += len(new_ids) - 1
        sequence.passes += 1
        sequence.drafts, sequence.proposed = [], []
        results.append(new_ids)
    return results


def _add(sequence: _Sequence, new_ids: list[int], eos: int | None, *, cut_by_model: bool) -> list[int]:
    """Append up to an end-of-sentence token; decide whether the sequence is done. Returns what was appended."""
    assert len(new_ids) <= sequence.left, (new_ids, sequence.left)
    if eos in new_ids:
        new_ids = new_ids[: new_ids.index(eos) + 1]
        sequence.reason = "eos"
    sequence.ids += new_ids
    if sequence.reason is None and sequence.left == 0:
        sequence.reason = "max_position_embeddings" if cut_by_model else "max_tokens"
    return new_ids


def _draft(decoder: Decoder, cache: LatentCache, active: Sequence[_Sequence], sampling: Sampling) -> None:
    """Let each depth draft one token; a sequence drafts no more than it could still use."""
    previous = {sequence.row: sequence.fresh for sequence in active}
    for depth in range(1, decoder.depths + 1):
        # A pass adds one token more than the drafts that stand.
        drafting = [sequence for sequence in active if sequence.left > depth]
        if not drafting:
            return
        parts = [part for sequence in drafting if (part := previous[sequence.row]) is not None]
        spans = [Span(s.row, s.cached - len(part), len(part)) for s, part in zip(drafting, parts, strict=True)]
        next_ids = []
        for sequence, span in zip(drafting, spans, strict=True):
            next_ids += [*sequence.ids, *sequence.drafts][span.start + depth : span.start + depth + span.num_tokens]
        hidden = decoder.predict(depth, torch.cat(parts), next_ids, spans, cache)
        parts = list(hidden.split([span.num_tokens for span in spans]))
        with torch.no_grad():
            proposed = probabilities(decoder.model.logits(torch.stack([part[-1] for part in parts])), sampling)
        for sequence, part, q in zip(drafting, parts, proposed, strict=True):
            sequence.drafts.append(draw(q, sequence.uniform()))
            sequence.proposed.append(q)
            previous[sequence.row] = part


def _complete(sequence: _Sequence) -> Completion:
    assert sequence.reason is not None
    return Completion(
        ids=tuple(sequence.ids[sequence.prompt_tokens :]),
        reason=sequence.reason,
        drafted=sequence.drafted,
        accepted=sequence.accepted,
        passes=sequence.passes,
    )
