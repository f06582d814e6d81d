"""`precision.keep_bf16_weights=false` is the same training: every loss and every bit of the state, and half the wire.

One spawn of two gloo ranks, and one process. The model's matrices are several blocks, some short, and ZeRO's shards cut
them in the middle.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kernels.fp8_linear import has_numbers, weight_fp8
from kernels.quantize import quantize_blocks
from parallel import fp8_weights
from tests.golden.runs import COMMON, SMALL, standing_in, write_golden_store
from tests.ranks import run_ranks
from tests.system.conftest import composed
from tests.system.lives import Look, look, losses, trainer_on, whole
from train.config import compose
from train.model import transformer
from train.observe.metrics import FP8_OPERANDS
from train.observe.sinks import read_run
from train.step import checkpoint_tensors
from train.trainer import Trainer

COMMONS = [
    *COMMON, *SMALL, "precision=fp8", "model.hidden_size=144", "model.intermediate_size=136", "optim.clip_norm=0.5",
    "schedule.total_tokens=384", "checkpoint.every_steps=2", "schedule.lr_peak=0.02", "schedule.warmup_steps=0",
    "model.num_nextn_predict_layers=0", "run.micro_batch_sequences=2", "observe.fp8_health_every_steps=0",
]  # fmt: skip
# Three steps on dp2, which runs resume too; two on the others.
SHORTER = "schedule.total_tokens=256"
LAYOUTS = {
    "one": [SHORTER, "observe.fp8_health_every_steps=3", "optim.ema_decay=null"],
    "dp2": ["layout.dp=2"],
    "ep2": [SHORTER, "layout.dp=2", "layout.ep=2"],
}
# Its masters are in host memory where weights are in FP8.
OFFLOADED = ["optim.offload=cpu"]
STEP_2 = "checkpoints/step_00000002"


def trainer_for(layout: str, name: str, *, keep: bool) -> Trainer:
    changes = [*LAYOUTS[layout], *OFFLOADED * (layout == "one" and not keep)]
    config = composed(*{text.split("=")[0]: text for text in [*COMMONS, *changes]}.values())
    run, precision = replace(config.run, name=name), replace(config.precision, keep_bf16_weights=keep)
    world = dist.get_world_size() if dist.is_initialized() else 1
    return trainer_on(replace(config, run=run, precision=precision), world)


def check_copies(trainer: Trainer) -> None:
    """After one more update: NaN to a reader, and the FP8 copies are those of the weights that the masters give."""
    weights = transformer.fp8_weights(trainer.engine.models[0], trainer.config.precision)
    assert weights
    # Those that the update writes: a save quantises anew.
    trainer.engine.optimizer.step(lr=0.02, step=4)
    for buckets in trainer.engine.optimizer.buckets:
        buckets.arrive()
    assert not any(map(has_numbers, weights.values()))
    assert all(bool(weight.isnan().all()) for weight in weights.values())
    with pytest.raises(AssertionError, match="inside whole_weights"):
        checkpoint_tensors(trainer.engine)
    copies = {name: weight_fp8(weight, power_of_two=True) for name, weight in weights.items()}
    held = {name: [t.clone() for t in (q.payload, q.scale, q.payload_t)] for name, q in copies.items()}
    with trainer.engine.optimizer.whole_weights():
        for name, weight in weights.items():
            fresh = quantize_blocks(weight, power_of_two=True)
            for found, expected in zip(held[name], (fresh.payload, fresh.scale, fresh.payload_t), strict=True):
                assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), name


def lives(rank: int, world: int, folder: Path, layouts: list[str]) -> tuple[dict[str, Look], list[int]]:
    """State after each run, of dp2 also after runs that change at step 2; bytes gathered in each step of dp2."""
    seen, sent, gather = dict[str, Look](), list[int](), fp8_weights.all_gather

    def count(out: torch.Tensor, own: torch.Tensor, **options: object) -> object:
        sent.append(out.nbytes)
        return gather(out, own, **options)

    with standing_in(folder):
        for layout in layouts:
            for keep, resumed in [(True, False), (False, False)] + [(True, True), (False, True)] * (layout == "dp2"):
                name = f"{layout}-{keep}{'-resumed' * resumed}"
                if resumed and rank == 0:
                    shutil.copytree(f"runs/{layout}-{not keep}/{STEP_2}", f"runs/{name}/{STEP_2}")
                if world > 1:
                    dist.barrier()
                trainer = trainer_for(layout, name, keep=keep)
                trainer.resume()
                if resumed:
                    assert trainer.changed["precision.keep_bf16_weights"] == [not keep, keep]
                if layout == "dp2" and not (keep or resumed):
                    fp8_weights.all_gather = count
                trainer.fit()
                fp8_weights.all_gather = gather
                with trainer.engine.optimizer.whole_weights():
                    seen[name] = look(trainer, score=False)
                if not keep:
                    check_copies(trainer)
    return seen, sent


def test_every_bit_is_that_of_training_with_bf16_weights(tmp_path: Path) -> None:
    write_golden_store(tmp_path / "store")
    two, runs = run_ranks(2, lives, tmp_path, ["dp2", "ep2"]), tmp_path / "runs"
    one = [lives(0, 1, tmp_path, ["one"])]
    for name, layout in ((name, name[:3]) for name in {**two[0][0], **one[0][0]}):
        ranks = [seen for seen, _ in (one if layout == "one" else two)]
        found, truth = (whole([seen[each] for seen in ranks]) for each in (name, f"{layout}-True"))
        assert found.keys() == truth.keys()
        assert not [each for each in truth if (found[each][1] != truth[each][1]).any()], name
        if "resumed" not in name:
            assert losses(runs / name) == losses(runs / f"{layout}-True")
    # Three steps; of dense linears and experts one bucket each, a byte an element and padding.
    linears = [2 * v.size for k, (_, v) in truth.items() if re.search("model.*(proj|experts)", k)]
    assert len(two[0][1]) == 3 * 2
    assert 0 <= sum(two[0][1]) / 3 - sum(linears) / 2 < 128 * (len(linears) + 2 * 2)
    # There is nothing to compare weights with; the other operands are the same.
    health = [read_run(runs / f"one-{keep}")[0]["fp8/amax"][0] for keep in (True, False)]
    weights = [FP8_OPERANDS.index(each) for each in ("w.fprop", "w.dgrad")]
    assert [health[1][i] for i in weights] == [0.0, 0.0] != [health[0][i] for i in weights]
    assert [x for i, x in enumerate(health[0]) if i not in weights] == [
        x for i, x in enumerate(health[1]) if i not in weights
    ]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["precision=bf16"], "precision=bf16 has none: use precision=fp8, or precision.keep_bf16_weights=true"),
        (["precision=fp8", "optim.backend=deepspeed"], "use optim.backend=native, or precision.keep_bf16_weights=true"),
    ],
)
def test_what_needs_bf16_weights_is_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        compose([*overrides, "precision.keep_bf16_weights=false"])
