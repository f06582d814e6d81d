"""Text from a model: prompts to tokens, tokens to a terminal as they come, and what drafting gains.

    continue_texts   prompts in, prompt and continuation out, in order, each piece as soon as it is certain
    measure          the same work with and without drafting, in one process: acceptance rate and the ratio of speeds

A token of byte-level BPE may hold part of a character. What is printed ends before an incomplete character, and a byte
that can belong to none is shown as U+FFFD once the next token has settled it: nothing printed is ever taken back.

A prompt begins with the token that samples of the model's training began with (`train/data/trained_on.py`), so the
empty prompt is one too. MTP drafting is that of arXiv:2412.19437 §5.4.3. Not here: chat templates, sampling
(`sampling.py`), the loop (`generate.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from train.data.store import TokenStore
from train.data.tokenizer import TextTokenizer
from train.generate.latent_cache import Decoder
from train.generate.sampling import Sampling
from train.generate.speculative import Completion, Request, batches_of, generate_in_batches

UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Generation:
    """What a command asks for.

    Args:
        max_tokens: new tokens a prompt, at most.
        seed: of the first prompt; the i-th, from 0, has seed + i, so it can be repeated alone.
        sampling: temperature and top-p.
        drafting: let MTP draft; None: if the model has MTP layers.
        batch_tokens: positions of the caches that are held together.
    """

    max_tokens: int = 100
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    drafting: bool | None = None
    batch_tokens: int = 16384

    def requests(self, prompts: Sequence[Sequence[int]]) -> list[Request]:
        """One request per prompt, given as tokens."""
        return [Request(tuple(ids), self.max_tokens, self.seed + i) for i, ids in enumerate(prompts)]


class TextStream:
    """Tokens in, the text that is certain out."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer, self._given = tokenizer, ""
        self._pending: list[int] = []

    def add(self, ids: Sequence[int]) -> str:
        """New text: everything but a last character that more bytes may complete."""
        self._pending += ids
        text = self._tokenizer.decode(self._pending)
        certain = text[:-1] if text.endswith(UNFINISHED) else text
        new, self._given = certain[len(self._given) :], certain
        if certain == text:
            self._pending, self._given = [], ""
        return new

    def end(self) -> str:
        """What is left when no token follows: U+FFFD if a character was never completed."""
        text = self._tokenizer.decode(self._pending)[len(self._given) :]
        self._pending, self._given = [], ""
        return text


class _InOrder:
    """Writes several streams one after another: the first that is not done as it comes, later ones from memory."""

    def __init__(self, heads: Sequence[str], tokenizer: TextTokenizer, eos: int, write: Callable[[str], None]) -> None:
        self._streams = [TextStream(tokenizer) for _ in heads]
        self._waiting, self._done = list(heads), [False] * len(heads)
        self._eos, self._write, self._now = eos, write, 0
        self._flush()

    def add(self, index: int, ids: Sequence[int]) -> None:
        """Tokens of one sequence; its end-of-sentence is not text."""
        self._waiting[index] += self._streams[index].add([token for token in ids if token != self._eos])
        self._flush()

    def end(self, index: int) -> None:
        """No token of this sequence follows."""
        self._waiting[index] += self._streams[index].end() + "\n"
        self._done[index] = True
        self._flush()

    def _flush(self) -> None:
        while self._now < len(self._waiting):
            if self._waiting[self._now]:
                self._write(self._waiting[self._now])
                self._waiting[self._now] = ""
            if not self._done[self._now]:
                return
            self._now += 1


def device_of(name: str) -> torch.device:
    """The device a command names; `auto` is a GPU if there is one.

    Raises:
        ValueError: no such device here.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    if name != "cpu" and not (available and name.startswith("cuda")):
        raise ValueError(f"device: {name} is not available here; use auto, cpu" + (" or cuda" if available else ""))
    return torch.device(name)


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Prompts of the command line, then the lines of a file; without any, the empty one.

    Raises:
        ValueError: the file is missing, empty, or not UTF-8.
    """
    if file is None:
        return list(given) or [""]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts-file: {file} cannot be read as UTF-8 text ({error}); one prompt a line") from None
    if not lines:
        raise ValueError(f"prompts-file: {file} is empty; put one prompt on a line")
    return [*given, *lines]


def prompt_ids(texts: Sequence[str], tokenizer: TextTokenizer, *, start: int) -> list[list[int]]:
    """Tokens of each text after the one that begins a sequence."""
    return [[start, *ids] for ids in tokenizer.encode_batch(texts)]


def store_prompts(store: TokenStore, tokenizer: TextTokenizer, *, start: int, tokens: int) -> list[list[int]]:
    """The beginning of every document that goes on after it.

    Args:
        store: tokenised text that the model has not seen.
        tokenizer: the model's.
        start: token that begins a sequence.
        tokens: of each document, after it.
    Raises:
        ValueError: the store has another tokeniser, or no document is so long.
    """
    if store.manifest.tokenizer_sha256 != tokenizer.sha256:
        raise ValueError(f"store: {store.path} was made with another tokenizer than the model's; prepare it with that")
    prompts = [
        [start, *store.document(index)[:tokens].tolist()]
        for index, length in enumerate(store.lengths)
        if length > tokens
    ]
    if not prompts:
        raise ValueError(f"store: {store.path} has no document of more than {tokens} tokens; ask for shorter prompts")
    return prompts


def continue_texts(
    decoder: Decoder,
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    asked: Generation,
    write: Callable[[str], None],
    *,
    start: int,
) -> str:
    """Continue every text and write it as it comes; several texts are written one after another under a heading.

    Args:
        decoder: the model.
        tokenizer: its tokeniser.
        texts: prompts; the empty one starts a new document.
        asked: how many tokens, how chosen.
        write: takes pieces of text, whole characters only.
        start: token that begins a sequence.
    Returns:
        One line about speed and drafting.
    Raises:
        ValueError: as `generate`.
    """
    requests = asked.requests(prompt_ids(texts, tokenizer, start=start))
    heads = [f"--- {i} of {len(texts)} ---\n{text}" for i, text in enumerate(texts, 1)] if len(texts) > 1 else texts
    eos = tokenizer.special_ids.eos
    printer = _InOrder(heads, tokenizer, eos, write)
    left = [0] * len(texts)
    limits = [min(asked.max_tokens, decoder.config.max_position_embeddings - len(r.prompt_ids)) for r in requests]

    def on_tokens(index: int, ids: list[int]) -> None:
        left[index] += len(ids)
        printer.add(index, ids)
        if ids[-1] == eos or left[index] == limits[index]:
            printer.end(index)

    started = time.perf_counter()
    done = generate_in_batches(
        decoder,
        requests,
        batch_tokens=asked.batch_tokens,
        sampling=asked.sampling,
        eos=eos,
        drafting=_drafting(decoder, asked),
        on_tokens=on_tokens,
    )
    return summary(done, time.perf_counter() - started, decoder)


def summary(done: Sequence[Completion], seconds: float, decoder: Decoder) -> str:
    """Tokens, speed, what drafting did, and whether the model's positions ran out."""
    tokens = sum(len(completion.ids) for completion in done)
    parts = [f"{tokens} tokens", f"{tokens / seconds:.1f} tokens/s with the prompts"]
    if drafted := sum(completion.drafted for completion in done):
        parts.append(
            f"{acceptance(done):.1%} of {drafted} drafts accepted, {tokens_a_pass(done):.2f} tokens a pass of the model"
        )
    if cut := sum(completion.reason == "max_position_embeddings" for completion in done):
        limit = decoder.config.max_position_embeddings
        parts.append(f"{cut} stopped at the model's {limit} positions (max_position_embeddings)")
    return ", ".join(parts)


def acceptance(done: Sequence[Completion]) -> float:
    """Accepted / drafted over all sequences; NaN where nothing was drafted."""
    drafted = sum(completion.drafted for completion in done)
    return sum(completion.accepted for completion in done) / drafted if drafted else float("nan")


def tokens_a_pass(done: Sequence[Completion]) -> float:
    """New tokens of a sequence and pass of the main model, the prompt's pass and its one token left out."""
    passes = sum(completion.passes for completion in done)
    return sum(len(completion.ids) - 1 for completion in done) / passes if passes else float("nan")


def measure(decoder: Decoder, prompts: Sequence[Sequence[int]], asked: Generation, *, rounds: int = 3) -> str:
    """Continue prompts with and without drafting, alternately; end-of-sentence does not end a sequence.

    Args:
        decoder: a model with MTP layers.
        prompts: tokens.
        asked: as for text; `drafting` is ignored.
        rounds: of each kind, after one of each that is not timed.
    Returns:
        Lines: acceptance and tokens a pass; for all prompts and for the first alone, the medians of tokens per second
        and their ratio; at temperature 0, how many prompts got the same tokens both ways.
    Raises:
        ValueError: as `generate`.
    """
    requests = asked.requests(prompts)

    def timed(batch: Sequence[Request], *, drafting: bool) -> tuple[float, list[Completion]]:
        started = time.perf_counter()
        done = generate_in_batches(
            decoder,
            batch,
            batch_tokens=asked.batch_tokens,
            sampling=asked.sampling,
            eos=None,
            drafting=drafting,
        )
        return sum(len(completion.ids) for completion in done) / (time.perf_counter() - started), done

    (_, drafted), (_, plain) = timed(requests, drafting=True), timed(requests, drafting=False)
    drafts = sum(completion.drafted for completion in drafted)
    lines = [
        f"{len(requests)} prompts, {asked.max_tokens} new tokens each, {asked.sampling}",
        f"acceptance rate {acceptance(drafted):.1%} of {drafts} drafts, {tokens_a_pass(drafted):.2f} tokens a pass",
    ]
    batches = len(list(batches_of(requests, asked.batch_tokens, decoder.config.max_position_embeddings)))
    together = "as one batch" if batches == 1 else f"in {batches} batches"
    for name, batch in ((together, requests), ("the first alone", requests[:1])):
        pairs = [(timed(batch, drafting=True)[0], timed(batch, drafting=False)[0]) for _ in range(rounds)]
        with_drafts, without = (sorted(speeds)[rounds // 2] for speeds in zip(*pairs, strict=True))
        lines.append(
            f"{name}: {with_drafts:.1f} tokens/s with drafting, {without:.1f} without, ratio "
            f"{with_drafts / without:.2f} (medians of {rounds}, alternating)"
        )
    if asked.sampling.temperature == 0.0:
        same = sum(a.ids == b.ids for a, b in zip(drafted, plain, strict=True))
        lines.append(f"the same tokens with and without: {same} of {len(requests)} prompts")
    return "\n".join(lines)


def _drafting(decoder: Decoder, asked: Generation) -> bool:
    return decoder.depths > 0 if asked.drafting is None else asked.drafting
