"""Log-likelihood of continuations under a model: what multiple choice and the harness adapter ask for.

    log p(continuation | context) = sum of log softmax(logits)[token] over the continuation's tokens

Requests are scored in batches of similar length, padded on the right. The model is causal and routes every token by
itself, so a place never sees what comes after it: padding and neighbours change nothing but the order of sums. For the
same reason a request whose input is the beginning of another's needs no forward pass of its own; it is read off the
longer one. Letters after one prompt ("A", "B", ...) so cost one pass together. A prompt that several *different* longer
continuations share is computed once for each: no keys and values are kept between requests.

Shapes: sequences = rows of a batch, tokens = its padded length, rows = places whose logits are wanted, vocab.
The model is injected as a function (`logits_of` makes it from a Transformer): one forward pass, then logits of some
places at a time, so that a large vocabulary is never held for all of them. Not here: prompts, and what counts as right
(`choice.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cross_entropy import cross_entropy_sum
from train.data.batch import Batch
from train.data.tokenizer import TextTokenizer
from train.evaluate.score import LossOfBatch
from train.generate.sampling import check_finite
from train.model.transformer import Transformer

# [sequences, tokens] int64 -> a function of [rows] places in its flat form -> [rows, vocab] logits
LogitsOf = Callable[[Tensor], Callable[[Tensor], Tensor]]

# Elements of one block of logits; each FP64 copy of a block has 256 MiB.
LOGITS_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Request:
    """A continuation to be scored after a context.

    Args:
        context: token ids before it; at least one.
        continuation: token ids to score; at least one.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """The answer to a `Request`.

    Args:
        log_probability: of the continuation, nats, at most 0.
        is_greedy: whether each of its tokens is the most likely one (of equal ones the lowest id).
        cut_tokens: how many tokens of the context were left out, from its beginning, to fit the model.
    """

    log_probability: float
    is_greedy: bool
    cut_tokens: int = 0


@dataclass(frozen=True)
class Scorer:
    """A model as something that scores continuations.

    Args:
        logits_of: the model.
        vocab_size: columns of its logits.
        max_tokens: longest input, tokens; longer contexts lose their beginning.
        batch_tokens: tokens of one forward pass, padding included; one input may have more.
    """

    logits_of: LogitsOf
    vocab_size: int
    max_tokens: int
    batch_tokens: int = 4096

    def check(self, requests: Sequence[Request]) -> None:
        """Refuse what `score` would refuse, without a forward pass.

        Raises:
            ValueError: a context or continuation without tokens, or a continuation longer than the model's input.
        """
        for request in requests:
            self._input(request)

    def score(self, requests: Sequence[Request]) -> list[Likelihood]:
        """Score requests; the answers come in their order.

        Raises:
            ValueError: as `check`, or a logit is not finite.
        """
        inputs = [self._input(request) for request in requests]
        carriers = _carriers(inputs)
        jobs: dict[tuple[int, ...], list[int]] = {}
        for index, tokens in enumerate(inputs):
            jobs.setdefault(carriers[tokens], []).append(index)
        answers: dict[int, Likelihood] = {}
        for batch in self._batches(sorted(jobs, key=lambda tokens: (-len(tokens), tokens))):
            answers |= self._score_batch(batch, jobs, requests, inputs)
        return [answers[index] for index in range(len(requests))]

    def _input(self, request: Request) -> tuple[int, ...]:
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

    def _batches(self, inputs: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Longest first, so that the first batch shows whether memory suffices."""
        while inputs:
            rows = max(1, self.batch_tokens // len(inputs[0]))
            yield inputs[:rows]
            inputs = inputs[rows:]

    @torch.no_grad()
    def _score_batch(
        self,
        batch: list[tuple[int, ...]],
        jobs: dict[tuple[int, ...], list[int]],
        requests: Sequence[Request],
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
        places = torch.tensor([first + i for _, first, targets in wanted for i in range(len(targets))])  # [rows]
        labels = torch.tensor([token for _, _, targets in wanted for token in targets])  # [rows]
        log_p, greedy = self._read(ids, places, labels)
        out, start = {}, 0
        for index, _, targets in wanted:
            part = slice(start, start + len(targets))
            cut = len(requests[index].context) + len(targets) - 1 - len(inputs[index])
            out[index] = Likelihood(float(log_p[part].sum()), bool(greedy[part].all()), cut)
            start = part.stop
        return out

    def _read(self, ids: Tensor, places: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[rows] log p of each label, FP64, and whether it is the most likely token."""
        unique, position = places.unique(return_inverse=True)
        logits_at = self.logits_of(ids)
        log_p = torch.empty(len(places), dtype=torch.float64)
        best = torch.empty(len(places), dtype=torch.bool)
        step = max(1, LOGITS_ELEMENTS // self.vocab_size)
        for first in range(0, len(unique), step):
            wide = logits_at(unique[first : first + step]).double()  # [block, vocab]
            check_finite(wide)
            asked = ((position >= first) & (position < first + step)).nonzero()[:, 0]  # [rows of this block]
            rows, targets = (position[asked] - first).to(wide.device), labels[asked].to(wide.device)
            log_p[asked] = (wide[rows, targets] - wide.logsumexp(-1)[rows]).cpu()
            # The lowest id of equal values: argmax does not promise which one it gives.
            ids_of = torch.arange(wide.shape[1], device=wide.device)
            top = torch.where(wide == wide.max(-1, keepdim=True).values, ids_of, wide.shape[1]).amin(-1)  # [block]
            best[asked] = (top[rows] == targets).cpu()
        return log_p, best


def _carriers(inputs: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Each input -> one that begins with it and is itself the beginning of no other.

    In sorted order the inputs that begin alike stand together, the beginning first.
    """
    carriers: dict[tuple[int, ...], tuple[int, ...]] = {}
    after: tuple[int, ...] = ()
    for tokens in sorted(set(inputs), reverse=True):
        if after[: len(tokens)] != tokens:
            after = tokens
        carriers[tokens] = after
    return carriers


def logits_of(model: Transformer, device: torch.device) -> LogitsOf:
    """The main model as a `LogitsOf`; the head is applied to the wanted places only."""

    def forward(input_ids: Tensor) -> Callable[[Tensor], Tensor]:
        hidden = model.next_token_hidden(input_ids.to(device)).flatten(0, 1)  # [sequences * tokens, hidden]
        return lambda places: model.logits(hidden[places.to(device)])  # [rows, vocab]

    return forward


def loss_of_batch(model: Transformer, device: torch.device) -> LossOfBatch:
    """The main model as what `score.py` injects: the same sum as the trainer's evaluation takes.

    Raises:
        ValueError: from the function: the loss is not finite.
    """

    @torch.no_grad()
    def loss(batch: Batch) -> tuple[float, int]:
        inputs = batch.inputs(device)
        hidden = model.next_token_hidden(inputs["input_ids"], inputs.get("document_ids"))
        nats = cross_entropy_sum(model.logits(hidden).flatten(0, 1), inputs["labels"].flatten())
        check_finite(nats)
        return float(nats.double()), batch.num_targets

    return loss


def encode_pair(tokenizer: TextTokenizer, context: str, continuation: str, *, start: int) -> Request:
    """Token ids of a continuation after a context, cut where the context's own tokens end.

    Blanks at the context's end go to the continuation; the two are tokenised together and the first as many ids as
    the context has by itself are the context. An empty context becomes the start token alone.

    Args:
        tokenizer: of the model.
        context: may be empty.
        continuation: the text to score.
        start: id that begins every sequence of the model.
    Source: the definition of lm-eval's `TemplateLM` (0.4.13), with the start token in front of every context.
    """
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    whole, before = tokenizer.encode_batch([context + continuation, context])
    return Request((start, *whole[: len(before)]), tuple(whole[len(before) :]))
