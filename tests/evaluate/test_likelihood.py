"""Likelihood of continuations: against one full forward a token in FP64 sums, and against `transformers`."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from tests.evaluate.planted import KNOWN, UNKNOWN, PlantedModel, small_tokenizer
from tests.model.test_oracle import pair
from tests.tiny_model import TINY, frozen
from train.data.tokenizer import train_byte_level_bpe
from train.evaluate.likelihood import Likelihood, LogitsOf, Scorer, encode_pair, logits_of
from train.evaluate.likelihood import LikelihoodRequest as Request
from train.model.transformer import Transformer

CPU = torch.device("cpu")
# FP32 logits of size about 10 with relative roundings near 1e-6 (depth of the longest sum), a dozen tokens each.
FP32_SUMS = 1e-4


@pytest.fixture(scope="module")
def model() -> Transformer:
    return frozen(seed=3)


def some_requests() -> list[Request]:
    """Lengths 1 to 40, groups with one context, beginnings of each other, the same twice."""
    draw = random.Random(4)
    ids = [draw.randrange(TINY.vocab_size) for _ in range(400)]
    requests = [Request(tuple(ids[i : i + 1 + i % 37]), tuple(ids[200 + i : 201 + i + i % 4])) for i in range(30)]
    shared = tuple(ids[50:63])
    requests += [Request(shared, (letter,)) for letter in range(10)]
    requests += [Request(shared, tuple(ids[9 * i : 9 * i + 5])) for i in range(4)]
    return [*requests, Request(shared[:5], shared[5:9]), requests[3]]


def one_by_one(model: Transformer, request: Request) -> tuple[float, bool]:
    """A forward pass over just what comes before each token, softmax and sum in FP64."""
    total, greedy = 0.0, True
    for i, token in enumerate(request.continuation):
        ids = torch.tensor([[*request.context, *request.continuation[:i]]])
        logits = model.logits(model.forward(ids).hidden)[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
    return total, greedy


def scorer_of(read: LogitsOf, **options: Any) -> Scorer:
    return Scorer(read, TINY.vocab_size, **{"max_tokens": 64, "batch_tokens": 256} | options)


def test_batched_likelihoods_equal_one_forward_per_token(model: Transformer) -> None:
    requests = some_requests()
    found = scorer_of(logits_of(model, CPU)).score(requests)
    for request, answer in zip(requests, found, strict=True):
        expected, greedy = one_by_one(model, request)
        assert answer.log_probability == pytest.approx(expected, abs=FP32_SUMS)
        assert answer.is_greedy == greedy
    # Likelihoods differ by far more than the tolerance.
    values = [answer.log_probability for answer in found[:10]]
    assert max(values) - min(values) > 1


def test_likelihoods_equal_those_of_transformers() -> None:
    oracle, ours = pair({})
    draw = random.Random(5)
    texts = [tuple(draw.randrange(97) for _ in range(draw.randint(1, 9))) for _ in range(24)]
    requests = [Request(*pair_) for pair_ in zip(texts[::2], texts[1::2], strict=True)]
    with torch.no_grad():
        found = Scorer(logits_of(ours, CPU), 97, max_tokens=64, batch_tokens=100).score(requests)
        for request, answer in zip(requests, found, strict=True):
            ids = torch.tensor([[*request.context, *request.continuation]])
            table = oracle(ids).logits[0].double().log_softmax(-1)
            first = len(request.context) - 1
            expected = sum(float(table[first + i, token]) for i, token in enumerate(request.continuation))
            assert answer.log_probability == pytest.approx(expected, abs=FP32_SUMS)


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_padding_order_and_company_change_nothing_but_rounding(model: Transformer, batch_tokens: int) -> None:
    requests = some_requests()
    expected = scorer_of(logits_of(model, CPU)).score(requests)
    order = random.Random(batch_tokens).sample(range(len(requests)), len(requests))
    found = scorer_of(logits_of(model, CPU), batch_tokens=batch_tokens).score([requests[i] for i in order])
    for answer, i in zip(found, order, strict=True):
        assert answer.log_probability == pytest.approx(expected[i].log_probability, abs=FP32_SUMS)


def test_padding_is_never_read() -> None:
    # The planted model depends on everything before a token, so padding would show.
    planted = PlantedModel()
    planted.plant((7, 8), (9,))
    planted.plant((7, 8, 0), (5,))
    found = planted.scorer().score([Request((7, 8), (9,)), Request(tuple(range(20, 30)), (1,))])
    assert planted.passes == [(2, 10)]
    assert found[0].log_probability == pytest.approx(KNOWN, abs=1e-6)
    assert (found[0].is_greedy, found[1].is_greedy) == (True, False)


def test_letters_after_one_prompt_cost_one_forward_pass() -> None:
    planted = PlantedModel()
    prompt = tuple(range(20))
    planted.scorer().score([Request(prompt, (letter,)) for letter in range(10)])
    planted.scorer().score([Request(prompt[:i], (3,)) for i in range(1, 20)] + [Request(prompt, (3, 4))])
    assert planted.passes[0] == (1, 20)
    # The beginnings ride along with (prompt, 3); (prompt[:i], 3) is read off it.
    assert planted.passes[1:] == [(1, 21)]


def test_logits_are_made_a_block_at_a_time(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = some_requests()
    expected = scorer_of(logits_of(model, CPU)).score(requests)
    monkeypatch.setattr("train.evaluate.likelihood.LOGITS_ELEMENTS", 3 * TINY.vocab_size + 1)
    found = scorer_of(logits_of(model, CPU)).score(requests)
    for one, other in zip(found, expected, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=FP32_SUMS)
        assert one.is_greedy == other.is_greedy
    monkeypatch.setattr("train.evaluate.likelihood.LOGITS_ELEMENTS", 3 * 262)
    planted = PlantedModel()
    # Eight positions of one pass; letters after the same prompt share theirs.
    planted.scorer().score([Request((1,), tuple(range(8))), Request((1,), (9,)), Request((1, 0), (9,))])
    assert planted.passes == [(1, 8)]
    assert planted.blocks == [3, 3, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_without_finite_logits_has_no_likelihoods(bad: float) -> None:
    broken = Scorer(lambda ids: lambda positions: torch.full((len(positions), 262), bad), 262, 64)
    with pytest.raises(ValueError, match="not finite numbers: its weights are damaged, or it diverged"):
        broken.score([Request((1,), (2,))])


def test_of_equal_tokens_the_lowest_is_the_greedy_one() -> None:
    found = PlantedModel().scorer().score([Request((5,), (0,)), Request((5,), (1,))])
    assert [answer.is_greedy for answer in found] == [True, False]


def test_a_long_context_loses_its_beginning_and_says_so() -> None:
    planted = PlantedModel()
    planted.plant((3, 4, 5), (6,))
    planted.plant((4, 5, 6), (7,))
    found = planted.scorer(max_tokens=3).score([Request((1, 2, 3, 4, 5), (6,)), Request((1, 2, 3, 4, 5), (6, 7))])
    # Of (6, 7) the inputs are 4, 5, 6: the first token is predicted from 4, 5 alone, which the table does not have.
    assert found[0] == Likelihood(pytest.approx(KNOWN, abs=1e-6), True, 2)  # type: ignore[arg-type]
    assert found[1] == Likelihood(pytest.approx(KNOWN + UNKNOWN, abs=1e-6), False, 3)  # type: ignore[arg-type]


REFUSED = {
    "context without tokens": Request((), (1,)),
    "continuation without tokens": Request((1,), ()),
    "continuation of 4 tokens is longer than the model's input of 3": Request((1,), (1, 2, 3, 4)),
}


@pytest.mark.parametrize(("message", "request_"), REFUSED.items())
def test_what_cannot_be_scored_is_refused(message: str, request_: Request) -> None:
    with pytest.raises(ValueError, match=message):
        PlantedModel().scorer(max_tokens=3).score([request_])


@pytest.mark.parametrize("text", ["his his his", "his is his"])
def test_a_continuation_without_a_token_of_its_own_is_scored_alone(text: str) -> None:
    tokenizer = train_byte_level_bpe([text], vocab_size=265)
    whole, context, alone = tokenizer.encode_batch(["his", "hi", "s"])
    # As many tokens as the context, or fewer: the cut of lm-eval leaves none.
    assert len(whole) <= len(context)
    found = encode_pair(tokenizer, "hi", "s", first_id=1)
    assert found == Request((1, *context), tuple(alone))
    planted = PlantedModel()
    planted.plant(found.context, found.continuation)
    assert planted.scorer().score([found])[0].log_probability == pytest.approx(KNOWN, abs=1e-6)


def test_blanks_at_the_end_of_a_context_belong_to_the_continuation() -> None:
    tokenizer = small_tokenizer()
    found = encode_pair(tokenizer, "ab ", "c", first_id=1)
    assert found == encode_pair(tokenizer, "ab", " c", first_id=1)
    assert (found.context[0], tokenizer.decode(found.context[1:])) == (1, "ab")
    assert tokenizer.decode(found.continuation) == " c"
    # An empty context is the start token.
    assert encode_pair(tokenizer, "", "c", first_id=1).context == (1,)
