"""Token generation for a batch of prompts, with MTP drafting (arXiv:2412.19437 §2.2, §5.4.3).

One round for all active sequences, each with tokens t_0 .. t_L of which t_0 .. t_{L-1} are in the cache:

    verify   the main model reads t_L and the drafts of t_{L+1} .. t_{L+d} in one pass (the first time, the prompt);
             the accepted drafts and one token more are the sequence's new tokens (`sampling.verify`)
    draft    MTP depth 1 reads the hidden states that the pass confirmed, each with the token after it, and drafts one
             token; depth k reads depth k-1's with the tokens k ahead, drafts among them, and drafts the next

The next pass overwrites rejected drafts in the cache. An entry of depth k at position i holds token i + k, so its last
k-1 entries of a round may hold drafts: each round computes the D-1 positions before its own once more.

Every sequence draws from its own stream of numbers, so the rest of the batch changes only the rounding of its logits.
With drafting the numbers are used differently: another sample of the same distribution.
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

Reason = Literal["eos", "stop", "max_tokens", "max_position_embeddings"]
# Called as soon as tokens are certain, with the index of a sequence, its new tokens (end-of-sentence included), and why
# it ends there, if it does. True ends the sequence: its text has come to a stop.
OnTokens = Callable[[int, list[int], Reason | None], bool | None]


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt of one or more tokens, the most new tokens, and the seed of the sequence's own stream of numbers."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """New tokens (the last is end-of-sentence if `reason` says so), and how many drafts were verified and accepted."""

    ids: tuple[int, ...]
    reason: Reason
    drafted: int
    accepted: int
    # Of the main model, after the prompt's.
    passes: int


@dataclass
class _Sequence:
    # Among the requests, and in the cache of its batch.
    index: int
    row: int
    ids: list[int]
    prompt_tokens: int
    # New tokens, and why the sequence ends there.
    limit: int
    limit_reason: Reason
    uniforms: torch.Generator
    # Positions in the main model's cache that hold final tokens: len(ids) - 1 after a pass.
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
        return float(torch.rand((), dtype=torch.float64, generator=self.uniforms))

    @property
    def left(self) -> int:
        """Tokens it may still add."""
        return self.limit - (len(self.ids) - self.prompt_tokens)

    def completion(self) -> Completion:
        assert self.reason is not None
        ids = tuple(self.ids[self.prompt_tokens :])
        return Completion(ids, self.reason, self.drafted, self.accepted, self.passes)


def generate(
    decoder: Decoder,
    requests: Sequence[GenerationRequest],
    *,
    sampling: Sampling,
    eos: int | None,
    drafting: bool,
    batch_tokens: int,
    on_tokens: OnTokens | None = None,
) -> list[Completion]:
    """Continue all prompts, as many at a time as fit into caches of `batch_tokens` positions; `eos` ends a sequence.

    A request that cannot be served raises ValueError before the first pass.
    """
    if batch_tokens < 1:
        raise ValueError(f"--batch-tokens {batch_tokens} must be 1 or more")
    for request in requests:
        _check(request, decoder.config)
    if drafting and not decoder.depths:
        raise ValueError(
            "drafting needs MTP layers, and this model has none (num_nextn_predict_layers=0): use --no-draft"
        )
    done: list[Completion] = []
    for batch in batches_of(requests, batch_tokens, decoder.config.max_position_embeddings):
        sequences = [_begin(requests[i], decoder.config, index=i, row=i - batch.start) for i in batch]
        _continue(decoder, sequences, sampling=sampling, eos=eos, drafting=drafting, on_tokens=on_tokens)
        done += [sequence.completion() for sequence in sequences]
    return done


def _continue(
    decoder: Decoder,
    sequences: Sequence[_Sequence],
    *,
    sampling: Sampling,
    eos: int | None,
    drafting: bool,
    on_tokens: OnTokens | None,
) -> None:
    """One batch, to the end of all of its sequences."""
    slots = max(sequence.prompt_tokens + sequence.limit for sequence in sequences)
    cache = decoder.new_cache(sequences=len(sequences), slots=slots, drafting=drafting)
    active = list(sequences)
    while active:
        for sequence, new_ids in zip(active, _verify(decoder, cache, active, sampling), strict=True):
            added = _add(sequence, new_ids, eos)
            if on_tokens is not None and on_tokens(sequence.index, added, sequence.reason):
                sequence.reason = "stop"
        active = [sequence for sequence in active if sequence.reason is None]
        if drafting:
            _draft(decoder, cache, active, sampling)


def batches_of(requests: Sequence[GenerationRequest], batch_tokens: int, positions: int) -> Iterator[range]:
    """Consecutive requests whose caches, each as long as the longest, fit; a single one may be larger than a batch.

    `positions` are those of the model; a sequence ends there, whatever is asked for.
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


def _check(request: GenerationRequest, config: ModelConfig) -> None:
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


def _begin(request: GenerationRequest, config: ModelConfig, *, index: int, row: int) -> _Sequence:
    prompt_tokens, seed = len(request.prompt_ids), request.seed
    positions = config.max_position_embeddings - prompt_tokens
    # torch's CPU generator reads the low 32 bits of a seed; larger seeds are hashed, so all bits matter.
    if seed >= 2**32:
        seed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")
    return _Sequence(
        index=index,
        row=row,
        ids=list(request.prompt_ids),
        prompt_tokens=prompt_tokens,
        limit=min(request.max_tokens, positions),
        limit_reason="max_position_embeddings" if positions < request.max_tokens else "max_tokens",
        uniforms=torch.Generator().manual_seed(seed),
    )


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
        previous = part[:0] if sequence.fresh is None else sequence.fresh
        previous = previous[max(0, len(previous) - decoder.depths + 1) :]
        sequence.fresh = torch.cat((previous, part[:confirmed]))
        sequence.cached += confirmed
        sequence.drafted += len(sequence.drafts)
        sequence.accepted += len(new_ids) - 1
        sequence.passes += 1
        sequence.drafts, sequence.proposed = [], []
        results.append(new_ids)
    return results


def _add(sequence: _Sequence, new_ids: list[int], eos: int | None) -> list[int]:
    """Append up to an end-of-sentence token and decide whether the sequence is done; returns what was appended."""
    assert len(new_ids) <= sequence.left, (new_ids, sequence.left)
    if eos in new_ids:
        new_ids = new_ids[: new_ids.index(eos) + 1]
        sequence.reason = "eos"
    sequence.ids += new_ids
    if sequence.reason is None and sequence.left == 0:
        sequence.reason = sequence.limit_reason
    return new_ids


def _draft(decoder: Decoder, cache: LatentCache, active: Sequence[_Sequence], sampling: Sampling) -> None:
    """Let each depth draft one token; a sequence drafts no more than it could still use."""
    previous = {sequence.row: sequence.fresh for sequence in active}
    for depth in range(1, decoder.depths + 1):
        # A pass adds one token more than the accepted drafts.
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
