"""Memory-bound bytes of a layer by phase, for the planner: counted by the ledger, kept in the planner's tables.

    python -m train.studies.bench.counted        rewrites train/studies/plan/tables/counted.json

Each entry of the ledger (`ledger.py`) belongs to one phase of a layer of a rank of h800_2048 (arXiv:2412.19437 §3.2.1):

    attend     norm, attention, second norm, router               experts    routed and shared experts, or the dense FFN
    exchange   copies of tokens for the all-to-all and the sums of what came back, which one that forwards makes itself;
               of `layout.dispatch=direct`, and "by node" of two hops

in forward, in the input part of backward, and in the weight part, which a schedule may run later. Products, attention
and the all-to-all have measured or published times of their own: their launches count, their bytes do not.

Three traces of each variant separate what scales with what. Half the tokens leave what a micro-batch moves however
short it is (`main_grad +=` of BF16 experts, gains of norms, rows that pad a group); half the hidden width leaves what
goes by the other widths: the heads for attend, the intermediate width for experts. Traced at V3's sizes.
"""

from __future__ import annotations

import ast
import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel.mesh import Mesh, single
from parallel.zero import GradientBuckets
from train.config import PretrainConfig, compose
from train.model.attention import RopeTables
from train.model.block import DenseBlock, MoEBlock
from train.studies.bench.ledger import LAYERS, ROOT, Entry, LayerName, block_of_rank, trace
from train.studies.plan.dry_run import as_rank
from train.studies.plan.tables import FOLDER
from train.studies.smoke_runs import precision_config

PATH = FOLDER / "counted.json"
# Launches whose time is known otherwise: products, attention, the exchange itself.
TIMED = re.compile(
    r"c10d::.*|_scaled_dot_product.*|(add)?mm(\..*)?|_?grouped_mm.*|_(gemm|rows|contraction)_kernel"
    r"|_split_product_kernel|_router_dgrad_kernel"
)
# Where the ledger says no more than the file: the first pattern that the line's function fits.
PHASES = (
    (r"train/model/attention\.py:|block\.py:(_Block\.attend|MoEBlock\.route)|moe\.py:Router", "attend"),
    (r"block\.py:(MoEBlock\.(shared|combine)|DenseBlock)|moe\.py:Experts", "experts"),
    (r"expert\.py:ExpertParallelDispatcher\.(dispatch|_grouping)", "experts"),
    (r"parallel/(expert|hops)\.py:", "exchange"),
)


@dataclass(frozen=True)
class LayerVariant:
    """What decides a layer's launches beside its widths."""

    layer: LayerName
    precision: Literal["fp8", "bf16"]
    recompute: bool
    attention_output: Literal["bf16", "e5m6"]

    @property
    def name(self) -> str:
        """As the planner's tables call it."""
        again = "recompute" if self.recompute else "keep"
        return f"{self.layer} {self.precision} {again} {self.attention_output}"


def variants() -> Iterator[LayerVariant]:
    """All that a run can be; a BF16 one keeps attention's output in BF16."""
    for layer, recompute in itertools.product(LAYERS, (True, False)):
        yield LayerVariant(layer, "bf16", recompute, "bf16")
        yield LayerVariant(layer, "fp8", recompute, "bf16")
        yield LayerVariant(layer, "fp8", recompute, "e5m6")


def entries_of(variant: LayerVariant, config: PretrainConfig, mesh: Mesh) -> tuple[Entry, ...]:
    """What the layer launches on this rank."""
    recipe = replace(precision_config(variant.precision), attention_output=variant.attention_output)
    config = replace(config, precision=recipe, run=replace(config.run, recompute=variant.recompute))
    block: MoEBlock | DenseBlock
    with FakeTensorMode(allow_non_fake_inputs=True):
        if variant.layer == "moe":
            block = block_of_rank(config, mesh)
        else:
            block = DenseBlock(config.model, recipe, RopeTables(config.model))
            block.self_attn.recompute = variant.recompute
        GradientBuckets(block.named_parameters(), axis=single(mesh.device).dp, sharded=False)
        shape = config.run.micro_batch_sequences, config.data.sequence_length, config.model.hidden_size
        return trace(block, shape, torch.bfloat16)[0]


def phase_of(entry: Entry) -> str:
    """Part of the layer and direction, `attend forward` to `experts weights`."""
    path, _, line = entry.line.partition(":")
    function = f"{path}:{_functions(path).get(int(line), '?')}"
    part = next((part for pattern, part in PHASES if re.search(pattern, function)), None)
    assert part is not None, f"{function} belongs to no phase: add it to PHASES"
    if "DenseBlock" in function and entry.operation == "norm" and not entry.deferred:
        part = "attend"
    return f"{part} {'weights' if entry.deferred else entry.phase}"


@functools.cache
def _functions(path: str) -> dict[int, str]:
    """Line -> qualified name of the innermost function or class."""
    found: dict[int, str] = {}

    def visit(node: ast.AST, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = outer
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = f"{outer}.{child.name}" if outer else child.name
                found.update(dict.fromkeys(range(child.lineno, (child.end_lineno or 0) + 1), name))
            visit(child, name)

    visit(ast.parse((ROOT / path).read_text(encoding="utf-8")), "")
    return found


def by_phase(entries: Iterable[Entry]) -> tuple[Counter[str], Counter[str]]:
    """Memory-bound bytes, and all launches, of each phase."""
    moved, launches = Counter[str](), Counter[str]()
    for entry in entries:
        phase = phase_of(entry)
        launches[phase] += entry.launches
        if not TIMED.fullmatch(entry.name):
            moved[phase] += entry.read_bytes + entry.written_bytes
    return moved, launches


def count(variant: LayerVariant, config: PretrainConfig, mesh: Mesh) -> dict[str, list[float]]:
    """Phase -> bytes a token by the hidden width, a token by other widths, a micro-batch; and launches."""
    tokens = config.data.sequence_length
    shorter = replace(config, data=replace(config.data, sequence_length=tokens // 2))
    narrower = replace(config, model=replace(config.model, hidden_size=config.model.hidden_size // 2))
    (whole, launches), (half, _), (narrow, _) = (
        by_phase(entries_of(variant, each, mesh)) for each in (config, shorter, narrower)
    )
    rows = {}
    for phase in launches:
        fixed = 2 * half[phase] - whole[phase]
        # What a micro-batch moves are weights and gains: they go by the hidden width.
        by_hidden = 2 * (whole[phase] - narrow[phase] - fixed / 2)
        others = whole[phase] - fixed - by_hidden
        rows[phase] = [round(by_hidden / tokens, 1), round(others / tokens, 1), round(fixed), launches[phase]]
    return rows


def rows_of(dispatch: str) -> dict[str, list[float]]:
    """The table's rows under one `layout.dispatch`: of `node` those in which it differs."""
    config, found = compose(["+cluster=h800_2048", f"layout.dispatch={dispatch}"]), dict[str, list[float]]()
    with as_rank(config, 0) as mesh:
        for variant in variants():
            if dispatch == "direct":
                found |= {f"{variant.name}, {phase}": row for phase, row in count(variant, config, mesh).items()}
            elif variant.layer == "moe":
                rows = {by_node(phase): row for phase, row in count(variant, config, mesh).items()}
                found |= {f"{variant.name}, {phase}": row for phase, row in rows.items() if "by node" in phase}
    return found


def by_node(phase: str) -> str:
    """A phase's name in the table where tokens take two hops."""
    return phase.replace("exchange", "exchange by node")


def main() -> None:
    """Count all variants and write the table."""
    rows = rows_of("direct") | rows_of("node")
    group = {
        "label": "counted",
        "source": "python -m train.studies.bench.counted: the ledger's traces of a rank of h800_2048, V3's sizes",
        "date": "2026-11-30",
        "unit": "B/token by hidden width, B/token by other widths, B/micro-batch, launches",
    }
    # A row a line: readable, and a change shows as one.
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    head = json.dumps(group)[:-1]
    PATH.write_text(f'{{"groups": [\n {head}, "rows": {{\n{lines}\n }}}}\n]}}\n', encoding="utf-8")
    print(f"{len(rows)} rows in {PATH.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
