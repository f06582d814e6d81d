"""The theorem in FP32: same tokens, any layout, same loss and gradients (`layout_theorem.py` says how it is tested).

Bounds (derived in docs/numerics.md, "Layouts"), u = 2^-24: a gradient is a sum over at most 384 tokens; regrouped over
ranks and micro-batches it moves by sqrt(384) u, times 4 for cancellation: 5e-6. A loss is such a sum without
cancellation and is then added over ranks: 2e-6. Without any forcing 20 steps stay within the promised 1e-5: two layouts
of several axes take them all, the others the first 6.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import train.stage
import train.step
from parallel.layout import Layout
from parallel.mesh import Axis
from parallel.zero import GradientBuckets
from tests.parity.layout_theorem import FORCED, STEPS, Comparison, Reference, compare, verdict, write_reference
from tests.ranks import run_ranks

GRADIENT_BOUND, LOSS_BOUND, FREE_BOUND = 5e-6, 2e-6, 1e-5
# The balance loss counts the plain top 3 of 8 scores, a choice of its own: a flip there moves f by 8 / (3 * 24) in one
# of 16 sequences, times the difference of two nearly equal P near 1/8, about a tenth of it: 1e-4 of six layers' sum.
FLIP_BOUND = 1e-4

# Enough for an update that goes wrong to reach the losses; drift over 20 steps is looked for in WHOLE.
FREE_STEPS = 6
# With and without ZeRO a run is the same, bit for bit: after three updates nothing new comes.
STEPS_WITHOUT_ZERO = 4
LAYOUTS = {
    "dp2": Layout(dp=2),
    "dp2 without ZeRO": Layout(dp=2, zero=False),
    "ep2": Layout(dp=2, ep=2),
    "ep4": Layout(dp=4, ep=4),
    "ep4 on two nodes": Layout(dp=4, ep=4, ranks_per_node=2, dispatch="node"),
    "pp2 1F1B uneven": Layout(pp=2, stage_layers=(3, 2)),
    "pp2 zero-bubble uneven": Layout(pp=2, schedule="ZBVZeroBubble", stage_layers=(2, 1, 1, 1)),
    "pp2 DualPipeV uneven": Layout(pp=2, schedule="DualPipeV", stage_layers=(2, 1, 1, 1)),
    "ep2 x pp2": Layout(pp=2, dp=2, ep=2),
    "dp2 x ep2 x pp2": Layout(pp=2, dp=4, ep=2, schedule="ZBVZeroBubble"),
    "dp2 x ep2 x pp2 without ZeRO": Layout(pp=2, dp=4, ep=2, schedule="ZBVZeroBubble", zero=False),
    "ep4 x pp2 on four nodes": Layout(pp=2, dp=4, ep=4, schedule="ZBVZeroBubble", ranks_per_node=2, dispatch="node"),
}
LONG = ("pp2 zero-bubble uneven", "ep4 x pp2 on four nodes")
# Free for all STEPS: all axes at once, and the same over two hops.
WHOLE = ("dp2 x ep2 x pp2", "ep4 x pp2 on four nodes")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    """One process's trajectory, and the folder it is in."""
    folder = tmp_path_factory.mktemp("fp32")
    return folder, run_ranks(1, write_reference, folder, "fp32")[0]


@pytest.fixture(scope="module")
def known() -> dict[Layout, list[tuple[float, ...]]]:
    """Losses of the free runs until now."""
    return {}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in LAYOUTS]
)
def ranks(request: pytest.FixtureRequest, reference: tuple[Path, Reference]) -> tuple[Layout, list[Comparison]]:
    """Every rank's comparison on one layout."""
    layout = LAYOUTS[request.param]
    free = (STEPS if request.param in WHOLE else FREE_STEPS) if layout.zero else STEPS_WITHOUT_ZERO
    return layout, run_ranks(layout.world, compare, layout, "fp32", reference[0], free=free)


def test_each_teacher_forced_step_gives_the_same_losses_gradients_norm_and_counts(
    ranks: tuple[Layout, list[Comparison]],
) -> None:
    layout, found = ranks
    result = verdict(found)
    bound = 0.0 if layout.dp == 1 else LOSS_BOUND
    assert max(result.losses) <= bound, "a pipeline alone changes no bit of the forward"
    assert result.norm <= LOSS_BOUND
    assert result.gradient[0] <= GRADIENT_BOUND, result.gradient
    assert result.counts_equal
    # A choice may differ only where the reference itself was closer to a tie than the scores are apart.
    assert result.score_error <= GRADIENT_BOUND
    assert all(margin <= 2 * result.score_error for margin in result.flips)
    steps = {len(values) for rank in found for values in rank.errors.values()}
    assert steps == {len(FORCED)}


def test_a_free_run_has_the_same_losses(
    ranks: tuple[Layout, list[Comparison]],
    reference: tuple[Path, Reference],
    known: dict[Layout, list[tuple[float, ...]]],
) -> None:
    """Without ZeRO it is the run with it, so its beginning is enough."""
    layout, found = ranks
    assert all(rank.free_losses == found[0].free_losses for rank in found), "every rank logs the same numbers"
    if not layout.zero:
        layout = replace(layout, zero=True)
        if layout not in known:
            run = run_ranks(layout.world, compare, layout, "fp32", reference[0], free=STEPS_WITHOUT_ZERO, steps=())
            known[layout] = run[0].free_losses
        assert found[0].free_losses == known[layout][:STEPS_WITHOUT_ZERO]
        return
    known[layout] = found[0].free_losses
    # The largest difference of biased scores that 20 free steps may have; a flip would need half the margin.
    assert reference[1].closest_tie > 4e-6
    for rank in found:
        steps = len(rank.free_losses)
        assert steps in (FREE_STEPS, STEPS)
        for ours, theirs in zip(rank.free_losses, reference[1].losses[:steps], strict=True):
            assert ours[:3] == pytest.approx(theirs[:3], rel=FREE_BOUND), "total, main and MTP loss"
            assert ours[3] == pytest.approx(theirs[3], rel=FLIP_BOUND), "balance"


DEFECTS = {
    "the balance loss of earlier stages is not attached": Layout(pp=2),
    "copies of the embedding are not summed": Layout(pp=2),
    "experts are averaged over their expert group": Layout(dp=2, ep=2),
    "counts stay on their rank": Layout(dp=2),
    "targets are counted on one rank": Layout(dp=2),
}


def compare_with_defect(rank: int, world: int, layout: Layout, folder: Path, defect: str) -> Comparison:
    """A step with a planted mistake."""
    if "attached" in defect:
        train.stage.attach_loss = lambda hidden, loss: hidden
    if "embedding" in defect:
        init = GradientBuckets.__init__
        GradientBuckets.__init__ = lambda self, *a, **k: init(self, *a, **k | {"tied": None})  # type: ignore[method-assign]
    if "averaged" in defect:
        reduce = GradientBuckets.reduce

        def averaged(self: GradientBuckets) -> None:
            reduce(self)
            for segment in self.parameter_shards():
                if ".experts." in segment.name:
                    segment.grad.div_(layout.ep)

        GradientBuckets.reduce = averaged  # type: ignore[method-assign]
    if "counts stay" in defect:
        total = train.stage.StepMetrics.reduce

        def own_counts(self: train.stage.StepMetrics, world: Axis) -> None:
            kept = self.counts.clone()
            total(self, world)
            self.counts = kept

        train.stage.StepMetrics.reduce = own_counts  # type: ignore[method-assign]
    if "targets" in defect:
        train.step.sum_over = lambda x, axis: x
    return compare(rank, world, layout, "fp32", folder, steps=range(1))


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_theorem_has_power(defect: str, reference: tuple[Path, Reference]) -> None:
    layout = DEFECTS[defect]
    result = verdict(run_ranks(layout.world, compare_with_defect, layout, reference[0], defect))
    if "counts stay" in defect:
        assert not result.counts_equal
    else:
        assert result.gradient[0] > 100 * GRADIENT_BOUND
