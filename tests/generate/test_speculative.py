"""The loop: drafting saves passes and changes nothing else; sequences end where they should, alone as in a batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.tiny_model import TINY, frozen
from train.generate import speculative
from train.generate.latent_cache import Decoder
from train.generate.sampling import Sampling
from train.generate.speculative import Completion, GenerationRequest, batches_of, generate
from train.model.transformer import Transformer

GREEDY = Sampling(temperature=0.0)
# Largest difference between a logit from the cache and one of the full forward, FP32: logits here are below 8, and
# tests/generate/test_latent_cache.py bounds the relative error by 1e-6.
DECODE_BOUND = 1e-5
PROMPTS = ((1, 7, 19, 4, 33, 60), (1,), (1, 2), (1, 50, 8, 8, 8, 21, 3, 40, 11))
both_ways = pytest.mark.parametrize("drafting", [False, True])


@pytest.fixture(scope="module")
def net() -> Transformer:
    return frozen()


def run(net: Transformer, requests: Sequence[GenerationRequest], **options: Any) -> list[Completion]:
    """Greedy, as one batch and without an end-of-sentence token, unless options say otherwise."""
    defaults = {"sampling": GREEDY, "eos": None, "drafting": False, "batch_tokens": 10**6}
    return generate(Decoder(net), requests, **defaults | options)


def greedy(net: Transformer, **options: Any) -> list[Completion]:
    return run(net, [GenerationRequest(prompt, 30) for prompt in PROMPTS], **options)


@pytest.fixture(scope="module")
def both(net: Transformer) -> tuple[list[Completion], list[Completion]]:
    """Without drafting, and with it."""
    return greedy(net), greedy(net, drafting=True)


def clear_choices(net: Transformer, prompt: Sequence[int], ids: Sequence[int]) -> list[int]:
    """The full forward's greedy token at each of `ids`, up to the first whose two best logits rounding could swap."""
    hidden = net.next_token_hidden(torch.tensor([[*prompt, *ids]]))
    best = net.logits(hidden)[0, len(prompt) - 1 : -1].topk(2)
    unclear = (best.values[:, 0] - best.values[:, 1] <= 2 * DECODE_BOUND).nonzero()
    return best.indices[: int(unclear[0]) if len(unclear) else len(ids), 0].tolist()


def planted(sign: float) -> Transformer:
    """A model whose next token depends on the last one alone, and an MTP chain that predicts the same, or its opposite.

    Without what attention and FFN add, the main model's logits are head(norm(Emb(t_i))); depth k's eh_proj takes
    sign * norm(Emb(t_{i+k})) and nothing of the hidden state.
    """
    net = frozen(std=0.5)
    for name, tensor in net.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            tensor.zero_()
        if name.endswith("eh_proj.weight"):
            tensor.copy_(torch.cat((sign * torch.eye(TINY.hidden_size), torch.zeros(TINY.hidden_size, 32)), dim=1))
    return net


def test_greedy_with_drafting_is_greedy_without(net: Transformer, both: Any) -> None:
    """Both are the full forward's tokens."""
    for prompt, plain, drafted in zip(PROMPTS, *both, strict=True):
        expected = clear_choices(net, prompt, plain.ids)
        assert len(expected) >= 25
        assert list(plain.ids[: len(expected)]) == list(drafted.ids[: len(expected)]) == expected
        assert drafted.drafted > 0


def test_of_equal_logits_the_lowest_id_is_chosen_with_and_without_drafting() -> None:
    net = frozen()
    # Every id has a twin 30 above it with the same row of the head.
    net.lm_head.weight[30:60] = net.lm_head.weight[:30]
    net.lm_head.weight[60] = 0.0
    for drafting in (False, True):
        assert all(token not in range(30, 60) for done in greedy(net, drafting=drafting) for token in done.ids)


@pytest.mark.parametrize(("sign", "passes"), [(1.0, -(-29 // 3)), (-1.0, 29)])
def test_a_perfect_predictor_is_always_accepted_and_an_opposite_one_never(sign: float, passes: int) -> None:
    net = planted(sign)
    for plain, drafted in zip(greedy(net), greedy(net, drafting=True), strict=True):
        assert drafted.ids == plain.ids
        assert drafted.drafted > 0
        assert drafted.accepted == (drafted.drafted if sign > 0 else 0)
        # One token of the prompt's pass; then passes of three, the last one as many as are left, or of one.
        assert (drafted.passes, plain.passes) == (passes, 29)


@pytest.mark.parametrize("depths", [1, 3])
def test_drafts_are_those_of_the_training_forward_after_any_rejection(
    depths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = frozen(replace(TINY, num_nextn_predict_layers=depths))
    rounds: list[list[int]] = []
    original = speculative.verify

    def verify(drafts: Sequence[int], *arguments: Any) -> list[int]:
        rounds.append(list(drafts))
        return original(drafts, *arguments)

    monkeypatch.setattr(speculative, "verify", verify)
    compared = rejected = 0
    for prompt in PROMPTS:
        rounds.clear()
        ids = [*prompt]
        (done,) = run(net, [GenerationRequest(prompt, 14)], drafting=True)
        for drafts in rounds:
            if drafts:
                # Draft k is depth k's token after ids and the k - 1 drafts before it, at the last position of ids but
                # one. The forward is causal: later drafts in the same sequence change nothing there.
                output = net(torch.tensor([[*ids, *drafts[:-1]]]))
            for depth, draft in enumerate(drafts, start=1):
                best = net.logits(output.mtp_hidden[depth - 1])[0, len(ids) - 2].topk(2)
                if float(best.values[0] - best.values[1]) > 2 * DECODE_BOUND:
                    assert draft == int(best.indices[0])
                    compared += 1
            rest = done.ids[len(ids) - len(prompt) :]
            accepted = next((k for k, draft in enumerate(drafts) if draft != rest[k]), len(drafts))
            ids += rest[: accepted + 1]
            rejected += accepted < len(drafts)
        assert ids == [*prompt, *done.ids]
    assert compared > 30
    assert rejected > 10


@both_ways
def test_samples_have_the_distribution_of_the_model(drafting: bool) -> None:
    # The first three tokens of 4000 sequences in one batch, against the full forward's probabilities of all 64 triples.
    config = replace(TINY, vocab_size=4)
    net, sampling, count = frozen(config, std=0.5), Sampling(temperature=8.0), 4000
    requests = [GenerationRequest((1, 2), 4, seed) for seed in range(count)]
    done = run(net, requests, sampling=sampling, drafting=drafting)
    triples = list(itertools.product(range(4), repeat=3))
    logits = net.logits(net.next_token_hidden(torch.tensor([[1, 2, *triple] for triple in triples])))
    p = (logits.double() / 8.0).softmax(-1)[:, 1:4]
    expected = p.gather(-1, torch.tensor(triples)[..., None])[..., 0].prod(-1) * count
    found = torch.zeros(64, dtype=torch.float64)
    for completion in done:
        found[triples.index(completion.ids[:3])] += 1  # type: ignore[arg-type]
    assert float(expected.min()) > 5
    chi_squared = float(((found - expected) ** 2 / expected).sum())
    # 63 degrees of freedom: a right sampler exceeds 126 once in 2e6 seeds; these seeds are fixed.
    assert chi_squared < 126
    if drafting:
        assert 0.1 < sum(d.accepted for d in done) / sum(d.drafted for d in done) < 0.9


@both_ways
def test_a_sequence_samples_the_same_alone_as_in_a_batch(net: Transformer, drafting: bool) -> None:
    options = {"sampling": Sampling(temperature=0.8, top_p=0.9), "drafting": drafting}
    requests = [GenerationRequest(prompt, 12, seed=5 + i) for i, prompt in enumerate(PROMPTS)]
    together = run(net, requests, **options)
    for request, done in zip(requests, together, strict=True):
        # A uniform number is within FP32 rounding of an edge once in about 1e5 draws; here are 200.
        assert run(net, [request], **options) == [done]
    assert run(net, [replace(request, seed=request.seed + 100) for request in requests], **options) != together


@both_ways
def test_a_sequence_ends_with_its_first_end_of_sentence_and_the_others_go_on(
    net: Transformer, both: Any, drafting: bool
) -> None:
    plain, _ = both
    eos = plain[0].ids[7]
    calls: list[tuple[int, list[int], str | None]] = []
    done = greedy(net, eos=eos, drafting=drafting, on_tokens=lambda *call: calls.append(call))
    for i, (ours, whole) in enumerate(zip(done, plain, strict=True)):
        end = whole.ids.index(eos) + 1 if eos in whole.ids else 30
        assert ours.ids == whole.ids[:end] == tuple(token for j, ids, _ in calls if i == j for token in ids)
        assert ours.reason == ("eos" if eos in whole.ids else "max_tokens")
        reasons = [reason for j, _, reason in calls if i == j]
        assert reasons == [None] * (len(reasons) - 1) + [ours.reason]
    assert "eos" in {completion.reason for completion in done}


def test_tokens_after_an_end_of_sentence_among_the_accepted_drafts_are_dropped() -> None:
    net = planted(1.0)
    request = [GenerationRequest(PROMPTS[0], 30)]
    (whole,) = run(net, request)
    inside = 0
    for eos in whole.ids[1:7]:
        (ours,) = run(net, request, drafting=True, eos=eos)
        end = whole.ids.index(eos) + 1
        assert (ours.ids, ours.reason) == (whole.ids[:end], "eos")
        # The first pass gives one token, each later one three.
        inside += end % 3 != 1
    assert inside > 0


@both_ways
def test_text_never_outgrows_the_models_positions(net: Transformer, drafting: bool) -> None:
    requests = [GenerationRequest(tuple(range(1, n)), 10) for n in (TINY.max_position_embeddings - 3, 20)]
    full, free = run(net, requests, drafting=drafting)
    assert (len(full.ids), full.reason) == (4, "max_position_embeddings")
    assert (len(free.ids), free.reason) == (10, "max_tokens")


def test_every_token_comes_of_a_pass_or_of_an_accepted_draft(both: Any) -> None:
    for done in both[1]:
        assert len(done.ids) == 1 + done.passes + done.accepted
        assert done.accepted <= done.drafted


def test_batches_are_consecutive_and_their_caches_fit() -> None:
    lengths = [3, 3, 3, 8, 1, 1, 30, 2, 2]
    requests = [GenerationRequest((1,) * (length - 1), 1) for length in lengths]
    batches = list(batches_of(requests, 16, 64))
    assert [list(batch) for batch in batches] == [[0, 1, 2], [3, 4], [5], [6], [7, 8]]
    assert list(batches_of(requests, 10**6, 64)) == [range(9)]
    assert list(batches_of([], 16, 64)) == []
    # Asked to go on for ever, a sequence ends where the model's positions do.
    endless = [GenerationRequest((1,), 10**9)] * 5
    assert list(batches_of(endless, 128, 64)) == [range(2), range(2, 4), range(4, 5)]


@both_ways
def test_batches_change_neither_samples_nor_the_callback(net: Transformer, drafting: bool) -> None:
    requests = [GenerationRequest(prompt, 12, seed=row) for row, prompt in enumerate(PROMPTS)]
    whole = run(net, requests, sampling=Sampling(1.0), drafting=drafting)
    received: dict[int, list[int]] = {}
    options = {"on_tokens": lambda row, ids, reason: received.setdefault(row, []).extend(ids), "batch_tokens": 40}
    found = run(net, requests, sampling=Sampling(1.0), drafting=drafting, **options)
    assert len(list(batches_of(requests, 40, TINY.max_position_embeddings))) > 1
    assert [done.ids for done in found] == [done.ids for done in whole]
    assert [tuple(received[row]) for row in range(len(PROMPTS))] == [done.ids for done in whole]


def test_every_bit_of_a_seed_matters(net: Transformer) -> None:
    seeds = (0, 1, 2**31, 2**32, 2**32 + 1, 5 * 2**32, 2**62)
    done = run(net, [GenerationRequest((1, 2), 20, seed=seed) for seed in seeds], sampling=Sampling(1.0))
    assert len({completion.ids for completion in done}) == len(seeds)


def test_generation_changes_nothing_in_the_model() -> None:
    net = frozen()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    tables = dict(net.layers["0"].self_attn.rope._tables)
    greedy(net, drafting=True)
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert net.layers["0"].self_attn.rope._tables.keys() == tables.keys()
    assert all(parameter.grad is None for parameter in net.parameters())


REFUSED = {
    "has no token": GenerationRequest((), 5),
    "max_tokens: 0": GenerationRequest((1,), 0),
    "holds token 61, the model knows ids below 61": GenerationRequest((1, 61), 5),
    "the model has 64 positions": GenerationRequest((1,) * 64, 5),
    "seed: -1": GenerationRequest((1,), 5, seed=-1),
}


@pytest.mark.parametrize(("message", "request_"), REFUSED.items(), ids=REFUSED.keys())
def test_a_request_that_cannot_be_served_is_refused(
    net: Transformer, message: str, request_: GenerationRequest
) -> None:
    with pytest.raises(ValueError, match=message):
        run(net, [request_])


def test_drafting_without_mtp_is_refused() -> None:
    net = frozen(replace(TINY, num_nextn_predict_layers=0))
    with pytest.raises(ValueError, match="drafting needs MTP layers"):
        greedy(net, drafting=True)
    assert len(greedy(net)[0].ids) == 30
