"""The summary of the demo: held-out bits per byte of its runs and of the baselines, and FP8's loss gap to BF16.

Reads the runs' logs and the stores; writes `summary.json` into each run directory, where the dashboard finds it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from train.data.ingest import Prepared
from train.data.whole_file import write_whole
from train.observe.sinks import read_run
from train.studies.compare import mean_smoothed_gap
from train.studies.dashboard.run_reader import SUMMARY_FILE
from train.studies.ngram_baselines import measure_baselines


@dataclass(frozen=True)
class DemoSummary:
    """Name -> bits per byte of the held-out text, and the mean relative gap of the smoothed losses."""

    scores: dict[str, float]
    baselines: dict[str, float]
    gap: float


def summarise(runs: dict[str, Path], stores: Prepared) -> DemoSummary:
    """Compare the run directories `bf16` (the reference) and `fp8`, trained and scored on `stores`.

    Raises:
        ValueError: a run was never scored, so it did not reach its end.
    """
    assert stores.heldout is not None, "the recipe keeps a tenth of the documents out"
    measured = measure_baselines(stores.train, stores.heldout)
    baselines = {"bigram (interpolated Kneser-Ney)": measured.bigram, "unigram": measured.unigram, "xz": measured.xz}
    scores: dict[str, float] = {}
    for name, run in runs.items():
        scored = [record["eval/bits_per_byte"] for record in read_run(run) if "eval/bits_per_byte" in record]
        if not scored:
            raise ValueError(f"{run} has no held-out score; let the run finish with data.heldout set")
        scores[name] = float(scored[-1])
    for name, run in runs.items():
        summary = {"heldout_bits_per_byte": scores[name], "baselines_bits_per_byte": baselines}
        write_whole(run / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return DemoSummary(scores, baselines, mean_smoothed_gap(read_run(runs["fp8"]), read_run(runs["bf16"])))
