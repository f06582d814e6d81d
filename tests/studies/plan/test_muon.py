"""What Muon's whole matrices cost in a plan: FLOPs that torch counts, and the trainer's own owners and messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.studies.plan.test_dry_run import small
from train.assemble import build_optimizer
from train.config import PretrainConfig, compose
from train.model.sizes import Held, held_by, weights
from train.optim.muon import Muon, orthogonalize
from train.optim.newton_schulz import orthogonalize_flops
from train.stage import build_stages, stage_specs
from train.studies.plan.bucketed import groups_of
from train.studies.plan.candidate import candidate_of
from train.studies.plan.dry_run import as_rank
from train.studies.plan.muon import RankShare, newton_schulz_s, shares
from train.studies.plan.products import Implementation, Setup, machine
from train.studies.plan.update import update_s

KIMI_K2 = compose(["+cluster=h800_2048", "model=kimi_k2", "optim=muon"])


@pytest.mark.parametrize("shape", [(180, 70), (70, 180), (33, 33), (1, 5)])
def test_flops_of_a_matrix_are_those_that_torch_counts(shape: tuple[int, int]) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(shape))
    assert counter.get_total_flops() == orthogonalize_flops(*shape)
    rows, cols = sorted(shape)
    assert orthogonalize_flops(*shape) == 5 * (4 * rows**2 * cols + 2 * rows**3)


def exchanged(config: PretrainConfig, rank: int) -> list[tuple[int, list[RankShare]]]:
    """Of each group of buckets of the trainer's optimizer: this rank's place on its axis, and what each rank computes.

    `sent` is this rank's, of its own messages; of the others it is not known here.
    """
    with as_rank(config, rank) as mesh, FakeTensorMode():
        models = [stage.model for stage in build_stages(config.model, config.precision, mesh).values()]
        optimizer = build_optimizer(models, config.optim, mesh)
        assert isinstance(optimizer, Muon)
        found = []
        for exchange in optimizer.exchanges:
            rounds = exchange._rounds
            sent = sum(values.numel() for each in rounds for _, values in each.away)
            sent += sum(place.stop - place.start for each in rounds for _, place in each.others)
            by_rank = [tuple((each.rows, each.cols) for each in own) for own in exchange.owned]
            found.append((exchange._axis.rank, [RankShare(own, sent) for own in by_rank]))
    return found


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_each_rank_computes_and_sends_what_the_trainer_has_it_do(precision: str) -> None:
    """Expert ranks and replicas; every element of the closed form, without building anything."""
    config = small(layout_dp=4, layout_ep=2, precision=precision, optim="muon", model_moe_intermediate_size=384)
    with as_rank(config, 0) as mesh:
        held = held_by(config.model, stage_specs(config.model, mesh).values())
    groups = groups_of(weights(config.model, held, ep=2), precision=precision)
    # Rank 1 shares experts with rank 3.
    sent = 0
    for rank in (1, 3):
        for group, (place, real) in zip(groups, exchanged(config, rank), strict=True):
            if not group:
                continue
            axis = 2 if group[0].expert else 4
            closed = shares(group, ranks=axis, precision=precision)
            assert [sorted(each.matrices) for each in closed] == [sorted(each.matrices) for each in real]
            assert closed[place].sent == real[place].sent
            sent += closed[place].sent
    assert sent > 0


def test_a_layer_of_kimi_k2_by_hand() -> None:
    """384 experts on 64 ranks, two replicas: of 6 x 3 matrices 2048 x 7168 each replica computes 9, which it holds."""
    matrix = 5 * (4 * 2048**2 * 7168 + 2 * 2048**3)
    assert matrix == 687_194_767_360
    candidate = candidate_of(KIMI_K2)
    table = weights(KIMI_K2.model, Held((7,), embedding=False, head=False), ep=64)
    _, _, experts, _ = groups_of(table, precision="fp8")
    of_ranks = shares(experts, ranks=2, precision="fp8")
    assert [[orthogonalize_flops(*size) for size in each.matrices] for each in of_ranks] == [[matrix] * 9] * 2
    assert [each.sent for each in of_ranks] == [0, 0]
    setup = Setup(KIMI_K2.model, candidate, Implementation("as written"), machine("H800"), 4096, muon=True)
    found = update_s(setup, Held((7,), embedding=False, head=False))
    # 9 x 0.687 TFLOP at 590 to 800 TFLOP/s, what was measured of BF16 products; the largest dense matrix is one of 128
    # ranks': o_proj, 7168 x 8192.
    dense = 5 * (4 * 7168**2 * 8192 + 2 * 7168**3)
    assert found["Newton-Schulz"] == pytest.approx(
        9 * newton_schulz_s(setup, 2048, 7168) + newton_schulz_s(setup, 7168, 8192)
    )
    assert (9 * matrix + dense) / 800e12 < found["Newton-Schulz"] < 1.35 * (9 * matrix + dense) / 590e12
    # 128 ranks: 7 of the others over NVLink, 120 over InfiniBand; the owner of o_proj gets all but its shard of each
    # bucket, and sends it back.
    o_proj = 4 * 7168 * 8192
    assert found["matrices, there and back"] == pytest.approx(o_proj * (7 / 127 / 160e9 + 120 / 127 / 50e9), rel=0.03)


def test_without_zero_every_rank_computes_all_and_sends_nothing() -> None:
    candidate = replace(candidate_of(KIMI_K2), zero=False)
    setup = Setup(KIMI_K2.model, candidate, Implementation("as written"), machine("H800"), 4096, muon=True)
    held = Held((7,), embedding=False, head=False)
    found, alone = update_s(setup, held), update_s(replace(setup, muon=False), held)
    every = [each for weight in weights(KIMI_K2.model, held, ep=64) if weight.by_muon for each in weight.matrices()]
    # Six in attention (q_a, kv_a, q_b, kv_b, o: five), gate, up and down of the shared expert and of six experts.
    assert len(every) == 5 + 3 + 18
    assert found["Newton-Schulz"] == pytest.approx(sum(newton_schulz_s(setup, *each) for each in every))
    assert found["matrices, there and back"] == 0
    # Beside AdamW the update takes no part away.
    assert alone.keys() < found.keys()
