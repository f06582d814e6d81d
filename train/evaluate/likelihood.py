"""Log-likelihood of continuations under a model: what multiple choice and lm-eval ask for.

    log p(continuation | context) = sum of log softmax(logits)[token] over the continuation's tokens

Requests are scored in batches of similar length, padded on the right. The model is causal and routes every token by
itself, so padding and neighbours change only the order of sums. For the same reason a request whose input is the
beginning of another's is read off the longer one: letters after one prompt ("A", "B", ...) cost one pass together.
A prompt that several *different* longer continuations share is computed once for each.

Shapes: sequences = rows of a batch, tokens = its padded length, positions = indices into the flat
[sequences * tokens], rows = positions whose logits are wanted, vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.data.batch import Batch
from train.data.tokenizer import TextTokenizer
from train.evaluate.score import LossOfBatch
from train.generate.sampling import check_finite
from train.model.transformer import Transformer

# [sequences, tokens] int64 -> a function of [rows] positions -> [rows, vocab] logits. One forward pass, then logits of
# some positions at a time: a large vocabulary is never held for all of them.
LogitsOf = Callable[[Tensor], Callable[[Tensor], Tensor]]

# Elements of one block of logits; each FP64 copy of a block has 256 MiB.
LOGITS_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class LikelihoodRequest:
    """A continuation to be scored after a context: at least one token id each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """The answer to a `LikelihoodRequest`."""

    # Of the whole continuation, nats.
    log_probability: float
    # Whether each of its tokens is the most likely one (of equal ones the lowest id).
    is_greedy: bool
    # Left out of the context, from its beginning, to fit the model.
    cut_tokens: int = 0


@dataclass(frozen=True)
class Scorer:
    """Scores continuations with a model."""

    logits_of: LogitsOf
    vocab_size: int
    # Longest input; longer contexts lose their beginning.
    max_tokens: int
    # Of one forward pass, padding included; one input may have more.
    batch_tokens: int = 4096

    def check(self, requests: Sequence[LikelihoodRequest]) -> None:
        """Raise ValueError for a context or continuation without tokens, or a continuation too long for the model."""
        for request in requests:
            self._input(request)

    def score(self, requests: Sequence[LikelihoodRequest]) -> list[Likelihood]:
        """Score requests, in order; ValueError as `check`, and for logits that are not finite."""
        inputs = [self._input(request) for request in requests]
        carriers = _carriers(inputs)
        jobs: dict[tuple[int, ...], list[int]] = {}
        for index, tokens in enumerate(inputs):
            jobs.setdefault(carriers[tokens], []).append(index)
        answers: dict[int, Likelihood] = {}
        # Longest first: the first batch shows whether memory suffices.
        left = sorted(jobs, key=lambda tokens: (-len(tokens), tokens))
        while left:
            sequences = max(1, self.batch_tokens // len(left[0]))
            answers |= self._score_batch(left[:sequences], jobs, requests, inputs)
            left = left[sequences:]
        return [answers[index] for index in range(len(requests))]

    def _input(self, request: LikelihoodRequest) -> tuple[int, ...]:
        """What the model reads: all but the last token, as much of it as fits."""
        if not request.context or not request.continuation:
            empty = "continuation" if request.context else "context"
            raise ValueError(f"a request to score has a {empty} without tokens: give both some text")
        if len(request.continuation) > self.max_tokens:
            raise ValueError(
                f"a continuation of {len(request.continuation)} tokens is longer than the model's input of "
                f"{self.max_tokens}; shorten it, or raise --max-length if the model was trained for more"
            )
        return (request.context + request.continuation)[:-1][-self.max_tokens :]

    @torch.no_grad()
    def _score_batch(
        self,
        batch: list[tuple[int, ...]],
        jobs: dict[tuple[int, ...], list[int]],
        requests: Sequence[LikelihoodRequest],
        inputs: list[tuple[int, ...]],
    ) -> dict[int, Likelihood]:
        width = len(batch[0])
        ids = torch.zeros(len(batch), width, dtype=torch.int64)  # [sequences, tokens]
        wanted: list[tuple[int, int, tuple[int, ...]]] = []
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            for index in jobs[tokens]:
                targets = requests[index].continuation
                wanted.append((index, row * width + len(inputs[index]) - len(targets), targets))
        positions = torch.tensor([first + i for _, first, targets in wanted for i in range(len(targets))])  # [rows]
        labels = torch.tensor([token for _, _, targets in wanted for token in targets])  # [rows]
        log_p, greedy = self._read(ids, positions, labels)
        out, start = {}, 0
        for index, _, targets in wanted:
            rows = slice(start, start + len(targets))
            cut = len(requests[index].context) + len(targets) - 1 - len(inputs[index])
            out[index] = Likelihood(float(log_p[rows].sum()), bool(greedy[rows].all()), cut)
            start = rows.stop
        return out

    def _read(self, ids: Tensor, positions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[rows] log p of each label, FP64, and whether it is the most likely token."""
        unique, row_of = positions.unique(return_inverse=True)
        logits_at = self.logits_of(ids)
        log_p = torch.empty(len(positions), dtype=torch.float64)
        best = torch.empty(len(positions), dtype=torch.bool)
        step = max(1, LOGITS_ELEMENTS // self.vocab_size)
        for first in range(0, len(unique), step):
            wide = logits_at(unique[first : first + step]).double()  # [block, vocab]
            check_finite(wide)
            asked = ((row_of >= first) & (row_of < first + step)).nonzero()[:, 0]  # [rows of this block]
            rows, targets = (row_of[asked] - first).to(wide.device), labels[asked].to(wide.device)
            log_p[asked] = (wide[rows, targets] - wide.logsumexp(-1)[rows]).cpu()
            # The lowest id of equal values: argmax does not promise which one it gives.
            ids_of = torch.arange(wide.shape[1], device=wide.device)
            top = torch.where(wide == wide.max(-1, keepdim=True).values, ids_of, wide.shape[1]).amin(-1)  # [block]
            best[asked] = (top[rows] == targets).cpu()
        return log_p, best


def _carriers(inputs: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Each input -> one that begins with it and is itself the beginning of no other."""
    # Sorted, inputs that begin alike are neighbours, the shortest first.
    carriers: dict[tuple[int, ...], tuple[int, ...]] = {}
    after: tuple[int, ...] = ()
    for tokens in sorted(set(inputs), reverse=True):
        if after[: len(tokens)] != tokens:
            after = tokens
        carriers[tokens] = after
    return carriers


def logits_of(model: Transformer, device: torch.device) -> LogitsOf:
    """The main model as a `LogitsOf`; the head is applied to the wanted positions only."""

    def forward(input_ids: Tensor) -> Callable[[Tensor], Tensor]:
        hidden = model.next_token_hidden(input_ids.to(device)).flatten(0, 1)  # [sequences * tokens, hidden]
        return lambda positions: model.logits(hidden[positions.to(device)])  # [rows, vocab]

    return forward


def loss_of_batch(model: Transformer, device: torch.device) -> LossOfBatch:
    """The main model as a `LossOfBatch`, the trainer's own sum; it raises ValueError for a loss that is not finite."""

    @torch.no_grad()
    def loss(batch: Batch) -> tuple[float, int]:
        inputs = batch.inputs(device)
        hidden = model.next_token_hidden(inputs["input_ids"], inputs.get("document_ids"))
        nats = model.cross_entropy(hidden, inputs["labels"])
        check_finite(nats)
        return float(nats.double()), batch.num_targets

    return loss


def encode_pair(tokenizer: TextTokenizer, context: str, continuation: str, *, first_id: int) -> LikelihoodRequest:
    """Token ids of a continuation after a context (possibly ""), which begins with `first_id`.

    Source: lm-eval's `TemplateLM` (0.4.13). Blanks at the context's end go to the continuation. The two are tokenised
    together and cut where the context's own tokens end. Where a token spans that place and nothing is left to score,
    the continuation is tokenised alone: it is scored after the same context as its rivals.
    """
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    whole, before = tokenizer.encode_batch([context + continuation, context])
    if len(whole) <= len(before):
        (alone,) = tokenizer.encode_batch([continuation])
        return LikelihoodRequest((first_id, *before), tuple(alone))
    return LikelihoodRequest((first_id, *whole[: len(before)]), tuple(whole[len(before) :]))
