"""Text from a model: prompts to tokens, tokens to a terminal as they come, and what drafting gains.

    continue_texts   prompts in; prompt and continuation out, in order, as soon as each character is complete, up to a
                     stop text
    measure          the same work with and without drafting, in one process: acceptance rate and the ratio of speeds

A token of byte-level BPE may hold part of a character. What is printed ends before an incomplete character, and a byte
that can belong to none is shown as U+FFFD once the next token has settled it, so nothing printed is ever taken back.
A prompt begins with the token that samples of the model's training began with, so it may be empty.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch

from train.data.store import TokenStore
from train.data.tokenizer import TextTokenizer
from train.generate.latent_cache import Decoder
from train.generate.sampling import Sampling
from train.generate.speculative import Completion, GenerationRequest, Reason, batches_of, generate

UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class GenerationSettings:
    """How prompts are continued: the flags of launch/generate.py."""

    max_tokens: int = 100
    # Of the first prompt; the i-th, from 0, has seed + i, so it can be repeated alone.
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    # None: where it is faster, `drafts_pay`.
    drafting: bool | None = None
    # Positions of the caches that are held together.
    batch_tokens: int = 16384
    # Each ends a continuation, which is written up to it.
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for stop in self.stops:
            if not stop:
                raise ValueError("--stop is empty, so nothing would be written: give the text before which to end")
            check_utf8("--stop", stop, "give it as UTF-8")

    def requests(self, prompts: Sequence[Sequence[int]]) -> list[GenerationRequest]:
        """One request per prompt, given as tokens."""
        return [GenerationRequest(tuple(ids), self.max_tokens, self.seed + i) for i, ids in enumerate(prompts)]


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
        """The rest when no token follows: U+FFFD if a character was never completed."""
        text = self._tokenizer.decode(self._pending)[len(self._given) :]
        self._pending, self._given = [], ""
        return text


class StopFilter:
    """Text in, the text before the first stop out; what may be the beginning of a stop waits for more."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._waiting, self.stopped = stops, "", False

    def add(self, text: str) -> str:
        """What is certain not to belong to a stop; nothing once there was one."""
        if self.stopped:
            return ""
        text = self._waiting + text
        # The stop that ends first, however the text was cut into tokens; of these the longest.
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return text[: min(ends)[1]]
        beginnings = (stop[:n] for stop in self._stops for n in range(1, len(stop)))
        held = max((len(part) for part in beginnings if text.endswith(part)), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What waited in vain."""
        return "" if self.stopped else self._waiting


class _OrderedWriter:
    """Writes several texts one after another: the first unfinished one as it comes, later ones from memory."""

    def __init__(
        self, heads: Sequence[str], tokenizer: TextTokenizer, write: Callable[[str], None], stops: Sequence[str]
    ) -> None:
        self._streams = [(TextStream(tokenizer), StopFilter(stops)) for _ in heads]
        self._waiting, self._done = list(heads), [False] * len(heads)
        self._write, self._current = write, 0
        self._flush()

    def on_tokens(self, index: int, ids: Sequence[int], reason: Reason | None) -> bool:
        """Whether the text has come to a stop."""
        stream, filter_ = self._streams[index]
        new = stream.add(ids[:-1] if reason == "eos" else ids)
        if reason is not None:
            new += stream.end()
        self._waiting[index] += filter_.add(new)
        if reason is not None or filter_.stopped:
            self._waiting[index] += filter_.end() + "\n"
            self._done[index] = True
        self._flush()
        return filter_.stopped

    def _flush(self) -> None:
        while self._current < len(self._waiting):
            if self._waiting[self._current]:
                self._write(self._waiting[self._current])
                self._waiting[self._current] = ""
            if not self._done[self._current]:
                return
            self._current += 1


def device_of(name: str) -> torch.device:
    """The device a command names; `auto` is a GPU if there is one. ValueError where it is not available."""
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    if name != "cpu" and not (available and name.startswith("cuda")):
        raise ValueError(f"device: {name} is not available here; use auto, cpu" + (" or cuda" if available else ""))
    return torch.device(name)


def check_utf8(flag: str, text: str, cure: str) -> None:
    """Raise ValueError for bytes of the command line that are no text."""
    if text.encode(errors="replace").decode() != text:
        raise ValueError(f"{flag} {text!a} is not UTF-8 text; {cure}")


def read_prompts(given: Sequence[str], file: Path | None, pipe: BinaryIO | None = None) -> list[str]:
    """Prompts of the command line, then the lines of a file or, with `-` or without any other, of a pipe.

    Without any, or with a pipe that is empty, the empty prompt.
    """
    for text in given:
        check_utf8("--prompt", text, "put it into a file and give --prompts-file")
    named = file is not None
    if file == Path("-"):
        file = None
        if pipe is None:
            raise ValueError("prompts-file: - reads a pipe, and there is none; send prompts in, one a line")
    elif named or given:
        pipe = None
    if file is None and pipe is None:
        return list(given) or [""]
    name = str(file) if file is not None else "the pipe"
    try:
        # Lines of a file: neither U+2028 nor a form feed ends one, and a byte order mark is no part of the first.
        raw = file.read_bytes() if file is not None else pipe.read()  # type: ignore[union-attr]
        content = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts-file: {name} cannot be read as UTF-8 text ({error}); one prompt a line") from None
    content = content.replace("\r\n", "\n")
    # Of a pipe, empty lines at the end come from the command before it.
    lines = (content.removesuffix("\n") if file is not None else content.rstrip("\n")).split("\n")
    if named and not content:
        raise ValueError(f"prompts-file: {name} is empty; put one prompt on a line")
    return [*given, *lines]


def prompt_ids(texts: Sequence[str], tokenizer: TextTokenizer, *, first_id: int) -> list[list[int]]:
    """Tokens of each text after the one that begins a sequence."""
    return [[first_id, *ids] for ids in tokenizer.encode_batch(texts)]


def store_prompts(store: TokenStore, tokenizer: TextTokenizer, *, first_id: int, tokens: int) -> list[list[int]]:
    """`first_id` and the first `tokens` of every document that is longer; ValueError if there is none."""
    if store.manifest.tokenizer_sha256 != tokenizer.sha256:
        raise ValueError(f"store: {store.path} was made with another tokenizer than the model's; prepare it with that")
    prompts = [
        [first_id, *store.document(index)[:tokens].tolist()]
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
    settings: GenerationSettings,
    write: Callable[[str], None],
    *,
    first_id: int,
) -> str:
    """Continue every text and write it as it comes, several under headings; returns a line on speed and drafting."""
    heads = [f"--- {i} of {len(texts)} ---\n{text}" for i, text in enumerate(texts, 1)] if len(texts) > 1 else texts
    writer = _OrderedWriter(heads, tokenizer, write, settings.stops)
    started = time.perf_counter()
    done = generate(
        decoder,
        settings.requests(prompt_ids(texts, tokenizer, first_id=first_id)),
        batch_tokens=settings.batch_tokens,
        sampling=settings.sampling,
        eos=tokenizer.special_ids.eos,
        drafting=drafts_pay(decoder) if settings.drafting is None else settings.drafting,
        on_tokens=writer.on_tokens,
    )
    return _summary(done, time.perf_counter() - started, decoder)


def drafts_pay(decoder: Decoder) -> bool:
    """Whether to draft if nobody says: with MTP layers, and not on a CPU, where it was slower (docs/generation.md)."""
    return decoder.depths > 0 and decoder.model.lm_head.weight.device.type != "cpu"


def _summary(done: Sequence[Completion], seconds: float, decoder: Decoder) -> str:
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


def measure(
    decoder: Decoder, prompts: Sequence[Sequence[int]], settings: GenerationSettings, *, rounds: int = 3
) -> str:
    """Lines on what drafting gains: acceptance, tokens a pass, and speed with and without it.

    Each way runs once untimed, then `rounds` times, alternating. End-of-sentence does not end a sequence.
    """
    requests = settings.requests(prompts)

    def timed(batch: Sequence[GenerationRequest], *, drafting: bool) -> tuple[float, list[Completion]]:
        started = time.perf_counter()
        done = generate(
            decoder, batch, batch_tokens=settings.batch_tokens, sampling=settings.sampling, eos=None, drafting=drafting
        )
        return sum(len(completion.ids) for completion in done) / (time.perf_counter() - started), done

    (_, drafted), (_, plain) = timed(requests, drafting=True), timed(requests, drafting=False)
    drafts = sum(completion.drafted for completion in drafted)
    lines = [
        f"{len(requests)} prompts, {settings.max_tokens} new tokens each, {settings.sampling}",
        f"acceptance rate {acceptance(drafted):.1%} of {drafts} drafts, {tokens_a_pass(drafted):.2f} tokens a pass",
    ]
    batches = len(list(batches_of(requests, settings.batch_tokens, decoder.config.max_position_embeddings)))
    together = "as one batch" if batches == 1 else f"in {batches} batches"
    for name, batch in ((together, requests), ("the first alone", requests[:1])):
        pairs = [(timed(batch, drafting=True)[0], timed(batch, drafting=False)[0]) for _ in range(rounds)]
        with_drafts, without = (sorted(speeds)[rounds // 2] for speeds in zip(*pairs, strict=True))
        lines.append(
            f"{name}: {with_drafts:.1f} tokens/s with drafting, {without:.1f} without, ratio "
            f"{with_drafts / without:.2f} (medians of {rounds}, alternating)"
        )
    if settings.sampling.temperature == 0.0:
        same = sum(a.ids == b.ids for a, b in zip(drafted, plain, strict=True))
        lines.append(f"the same tokens with and without: {same} of {len(requests)} prompts")
    return "\n".join(lines)
