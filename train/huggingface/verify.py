"""Proof of a finished conversion: what is on the disk, read back by another way, against the source.

    files      size and sha256 of every file, as the journal (export) or the manifest (import) has them
    tensors    names, dtypes, shapes and files exactly those of the plan; index and headers agree; nothing surplus
    values     of every tensor of ours some rows, or one expert, read back from the files: FP32 equal, BF16 equal after
               one rounding, FP8 within half a step of E4M3 (rounding is to nearest; a wrong payload is off by more)
    logits     optional: another implementation of the model reads the folder and computes the same; this alone proves
               the name mapping, which export and verification share

Shapes: rows [rows, in] or [1, out, in]; logits [sequences, tokens, vocab].
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.formats import TILE, Quantized
from kernels.quantize import dequantize_blocks
from train.checkpoint import publish
from train.huggingface.names import SCALE_SUFFIX, ExportPlan, shapes_of
from train.huggingface.reader import CONFIG, INDEX, HfReader
from train.huggingface.safetensors_files import JOURNAL, read_json
from train.huggingface.weights import CheckpointReader, WeightSource, load_model
from train.model.precision import Precision

# Nearest rounding is off by half a step at most. FP32 division and product move a value by 2^-23 of itself, and it is
# below 16 steps: 2e-6 of a step.
STEP_BOUND = 0.5 + 1e-4
# Two FP32 implementations of one model differ by rounding, about 1e-6; a mistake in the weights shows as 1e-2.
LOGITS_BOUND = 1e-4
# Two FP32 copies of the model, ours and the other one, are in memory then.
LOGITS_PARAMETERS = 2 * 10**9
# E4M3's smallest normal is 2^-6, and it has three mantissa bits.
_SMALLEST_EXPONENT, _MANTISSA_BITS = -6, 3

# Another implementation: (folder, ids [sequences, tokens] int64, values by released name where the folder is FP8)
# -> logits [sequences, tokens, vocab] FP32.
Oracle = Callable[[Path, Tensor, dict[str, Tensor] | None], Tensor]


@dataclass(frozen=True)
class Verified:
    """Numbers of files hashed, of our tensors and of values compared; largest FP8 error in steps of E4M3, 0 without."""

    files: int
    tensors: int
    values: int
    worst_step: float

    def summary(self) -> str:
        """One line for the user."""
        steps = f", FP8 within {self.worst_step:.3f} steps of E4M3" if self.worst_step else ""
        return f"{self.files} files by hash, {self.tensors} tensors by name and shape, {self.values:,} values{steps}"


def verify_export(source: WeightSource, out: Path, plan: ExportPlan) -> Verified:
    """Prove that the folder `out` is the export of a source by a plan.

    Raises:
        ValueError: the first thing that is wrong; named.
    """
    files = _check_hashes(out, plan)
    reader = HfReader(out)
    if read_json(out / INDEX) != plan.index():
        raise ValueError(f"{out / INDEX} is not the index of this export; export again")
    planned = {spec.name: (shard.name, spec.dtype, spec.shape) for shard in plan.shards for spec in shard.tensors}
    for name in sorted(planned.keys() | reader.stored.keys()):
        if planned.get(name) != reader.stored.get(name):
            raise ValueError(f"{out} holds {name} as {reader.stored.get(name)}, not {planned.get(name)}; export again")
    reader.check_shared_copies()
    num_values, worst = 0, 0.0
    for name in reader.names():
        rows = sampled_rows(name, reader.shape(name))
        expected = source.read(name, rows)
        worst = max(worst, _compare(reader, name, rows, expected))
        num_values += expected.numel()
    return Verified(files, len(reader.names()), num_values, worst)


def _check_hashes(out: Path, plan: ExportPlan) -> int:
    journal = read_json(out / JOURNAL)
    files = journal.get("files") if isinstance(journal, dict) else None
    if not isinstance(files, dict):
        raise ValueError(f"{out / JOURNAL} is damaged: it lacks 'files'; delete {out} and export again")
    for name in (*plan.files, INDEX, CONFIG):
        if name not in files:
            raise ValueError(f"{out} is not finished: {name} is not in its {JOURNAL}; run the same export again")
    for name, entry in files.items():
        file = out / name
        if file.parent != out or not file.is_file() or publish.entry_of(file) != entry:
            raise ValueError(f"{file} is missing or not as it was written; run the same export again to repair it")
    return len(files)


def sampled_rows(name: str, shape: tuple[int, ...]) -> range:
    """The rows of our tensor `name` that are compared, up to 128, or one expert; they depend on the name only."""
    count = 1 if len(shape) == 3 else min(TILE, shape[0])
    first = zlib.crc32(name.encode()) % (shape[0] - count + 1)
    return range(first, first + count)


def _compare(reader: HfReader, name: str, rows: range, expected: Tensor) -> float:
    """Compare rows of ours with what is stored; returns the largest error in steps of E4M3."""
    flat = expected.flatten(0, 1) if expected.dim() == 3 else expected
    first, worst = 0, 0.0
    for released, its_rows in reader.released_rows(name, rows):
        values = flat[first : first + len(its_rows)]
        first += len(its_rows)
        if reader.stored[released].dtype == "F8_E4M3":
            error = _step_error(reader, released, its_rows, values)
            worst = max(worst, error)
            same = error <= STEP_BOUND
        else:
            stored = reader.values(released, its_rows)
            same = torch.equal(stored, values.to(stored.dtype))
        if not same:
            raise ValueError(
                f"{reader.path} holds {released} with other values than {name} rows {rows.start} to {rows.stop} "
                "of the source; delete the folder and export again"
            )
    assert first == len(flat), (name, first, len(flat))
    return worst


def _step_error(reader: HfReader, released: str, rows: range, values: Tensor) -> float:
    """Largest |stored - values| in steps of E4M3 at each value; infinite where a scale is 0."""
    q, inside = reader.blocks(released, rows)
    ones = torch.ones(q.payload.shape).to(torch.float8_e4m3fn)
    scale = dequantize_blocks(Quantized(ones, q.scale))[inside]  # [rows, in]
    relative = values.float() / scale
    # frexp gives zero the exponent of 1; the numbers around zero are the smallest there are.
    exponent = torch.where(relative == 0, _SMALLEST_EXPONENT, torch.frexp(relative).exponent - 1)
    step = scale * torch.exp2(exponent.clamp_min(_SMALLEST_EXPONENT).float() - _MANTISSA_BITS)
    return float(((dequantize_blocks(q)[inside] - values.float()).abs() / step).nan_to_num(nan=torch.inf).max())


def verify_import(source: HfReader, path: Path) -> Verified:
    """Prove that the checkpoint at `path` is the import of a Hugging Face folder.

    Raises:
        ValueError: the first thing that is wrong; named.
    """
    reader = CheckpointReader(path)
    reader.verify()
    if reader.config != source.config:
        raise ValueError(f"{path} has another configuration than {source.path}; import into a new folder")
    shapes = shapes_of(source.config, reader.precision)
    if set(reader.names()) != set(shapes):
        raise ValueError(f"{path} holds other tensors than {source.path}; import into a new folder")
    num_values = 0
    for name, (shape, dtype) in shapes.items():
        rows = sampled_rows(name, shape)
        found = reader.read(name, rows)
        if found.dtype != dtype or not torch.equal(found, source.read(name, rows).to(dtype)):
            raise ValueError(f"{path} holds {name} with other values than {source.path}; import into a new folder")
        num_values += found.numel()
    return Verified(sum(1 for _ in path.iterdir()), len(shapes), num_values, 0.0)


@dataclass(frozen=True)
class LogitsGap:
    """Relative Frobenius distances, all in FP32, of our model with the folder's weights."""

    to_oracle: float  # to the other implementation with the same weights
    to_source: float  # to itself with the source's weights: the cost of the format


@torch.no_grad()
def compare_logits(source: WeightSource, out: Path, oracle: Oracle) -> LogitsGap:
    """Compute logits of a few random tokens with two implementations, and with the weights of folder and source.

    Raises:
        ValueError: the model is too large for it, or the implementations disagree.
    """
    reader = HfReader(out)
    num_parameters = sum(torch.Size(reader.shape(name)).numel() for name in reader.names())
    if num_parameters > LOGITS_PARAMETERS:
        raise ValueError(
            f"--logits holds the whole model twice in FP32 and is for at most {LOGITS_PARAMETERS:,} parameters, "
            f"not {num_parameters:,}; leave it out"
        )
    generator = torch.Generator().manual_seed(0)
    num_tokens = min(33, reader.config.max_position_embeddings)
    ids = torch.randint(0, reader.config.vocab_size, (2, num_tokens), generator=generator)
    mine, cpu = [], torch.device("cpu")
    for weights in (reader, source):
        model = load_model(weights, precision=Precision("fp32"), device=cpu)
        mine.append(model.logits(model.next_token_hidden(ids)))
        del model
    # Here, not by the oracle: on a CPU `transformers` 5.23 takes rows / scale rows for the size of a block, which is
    # wrong wherever the last block is ragged.
    dequantised = None
    if any(stored.dtype == "F8_E4M3" for stored in reader.stored.values()):
        names = [name for name in reader.stored if not name.endswith(SCALE_SUFFIX)]
        dequantised = {name: reader.values(name, range(reader.stored[name].shape[0])) for name in names}
    expected = oracle(out, ids, dequantised)
    gap = LogitsGap(_relative(mine[0], expected), _relative(mine[0], mine[1]))
    if not gap.to_oracle <= LOGITS_BOUND:
        raise ValueError(
            f"logits of {out} differ by {gap.to_oracle:.2e} (relative) between our model and the other implementation, "
            f"more than {LOGITS_BOUND:.0e}: the export or one of the two is wrong"
        )
    return gap


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
