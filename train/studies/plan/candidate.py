"""One way to run a model on a number of GPUs: what the planner compares.

    layout       ranks along each axis, schedule, layers of each stage (arXiv:2412.19437 §3.2)
    memory       micro-batch, recomputation, precision, ZeRO-1
    exchange     how tokens travel to experts, and whether computation hides it

It may name schedules and exchanges that the trainer cannot run yet; `orders.SCHEDULES` and `search.py` say which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from parallel.balance import balanced_layers
from train.model.sizes import layer_costs, parameter_counts

if TYPE_CHECKING:
    from train.config import PretrainConfig

# `layout.dispatch`, and DeepEP's two hops at once.
Dispatch = Literal["direct", "node", "deepep"]


@dataclass(frozen=True)
class Candidate:
    """A layout with everything that decides its memory and its time.

    Args:
        chunks: stages that one pipeline rank owns.
        stage_layers: main layers of each of the pp x chunks stages, first to last; the last one has the final norm, the
            head and the MTP layers besides.
        recompute: queries, keys and values are made again in backward (`run.recompute`).
        dispatch: one hop to each expert's rank; over InfiniBand once for each node, and then on inside it; or both hops
            side by side, as DeepEP has them.
        overlap: forward and backward chunks run in pairs, each hiding the other's exchange.
        comm_sms: SMs lent to the exchange while it is hidden.
    """

    pp: int
    dp: int
    ep: int
    schedule: str
    chunks: int
    stage_layers: tuple[int, ...]
    micro_batch_sequences: int = 1
    recompute: bool = True
    precision: Literal["bf16", "fp8"] = "fp8"
    keep_bf16_weights: bool = True
    attention_output: Literal["bf16", "e5m6"] = "bf16"
    zero: bool = True
    dispatch: Dispatch = "direct"
    overlap: bool = False
    comm_sms: int = 20
    max_waiting_wgrads: int | None = None
    max_expert_rows: int | None = None
    ranks_per_node: int = 8

    def __post_init__(self) -> None:
        assert self.dp % self.ep == 0, (self.dp, self.ep)
        assert len(self.stage_layers) == self.pp * self.chunks, (self.stage_layers, self.pp, self.chunks)

    @property
    def world(self) -> int:
        """GPUs in all."""
        return self.pp * self.dp

    @property
    def edp(self) -> int:
        """Replicas of each expert."""
        return self.dp // self.ep

    @property
    def two_hops(self) -> bool:
        """As `Layout.two_hops`."""
        return self.dispatch == "node" and 1 < self.ranks_per_node < self.ep


def candidate_of(config: PretrainConfig) -> Candidate:
    """The layout of a configuration as the trainer runs it."""
    layout, precision = config.layout, config.precision
    split = layout.stage_layers or balanced_layers(layer_costs(config.model), layout)
    return Candidate(
        pp=layout.pp,
        dp=layout.dp,
        ep=layout.ep,
        schedule=layout.schedule,
        chunks=layout.chunks,
        stage_layers=split,
        micro_batch_sequences=config.run.micro_batch_sequences,
        recompute=bool(config.run.recompute),
        precision=precision.name,  # type: ignore[arg-type]  # `document.plan` refuses the others
        keep_bf16_weights=precision.keep_bf16_weights,
        attention_output=precision.attention_output,
        zero=layout.zero,
        max_waiting_wgrads=layout.max_waiting_wgrads,
        # One of two hops that is idle is none.
        dispatch=layout.dispatch if layout.two_hops or layout.dispatch == "deepep" else "direct",
        max_expert_rows=layout.max_expert_rows,
        ranks_per_node=layout.ranks_per_node,
    )


def run_of(config: PretrainConfig) -> dict[str, Any]:
    """What else a plan is of, by the names of its document."""
    return {
        "world": config.layout.world,
        "sequence_length": config.data.sequence_length,
        "batch_sequences": config.schedule.batch_full_sequences,
        "precision": config.precision.name,
        "parameters": parameter_counts(config.model),
    }
