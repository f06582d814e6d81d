"""Mirror of the run's records to wandb, under the same names; the only file that imports wandb.

wandb talks to another process and perhaps to a server, so it may be slow, hang or raise. Training must not notice:
a daemon thread owns wandb, training only puts small dicts into a bounded queue. On the first failure, or when the
thread falls a whole queue behind, the mirror logs one warning and turns itself off; metrics.jsonl stays complete.

    numbers           under their names; wandb groups `area/name` into a panel section a name's area
    tables            a histogram of the finite values under the table's name
    tables `fp8/*`    besides, per operand, the worst layer: `fp8/snr_db/x.fprop`
    events            in the run's summary: `event/<kind>` = last step of that kind

Losses and scores are drawn over tokens_seen, all else over step. The run's config is the whole configuration and,
under `run_card`, the run card. The wandb run belongs to the run directory: its id is stored there in `wandb_id`, and
every process that resumes the run continues it. Online without credentials becomes offline: the files are in
<run directory>/wandb, and `wandb sync` sends them later (docs/metrics.md).
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from train.data.whole_file import write_whole
from train.observe.metrics import FP8_OPERANDS, METRICS, Record

_log = logging.getLogger(__name__)

# A step record with its tables as histograms is a few kilobytes, so a full queue holds some tens of megabytes.
QUEUE_RECORDS = 4096
# wandb's own limit; beyond it the unsent rest stays on disk for `wandb sync`.
FINISH_TIMEOUT_S = 20.0
ID_FILE = "wandb_id"
HISTOGRAM_BINS = 64
# Drawn over tokens: runs of different batch sizes can be compared.
OVER_TOKENS = ("loss/*", "eval/*")


def _mirrored(record: Record) -> Record:
    """A step record for wandb: numbers as they are, tables as histograms (counts, edges) and worst layers."""
    values: Record = {}
    for name, value in record.items():
        if METRICS[name].kind != "table":
            values[name] = value
            continue
        table = np.asarray(value, dtype=np.float64)  # [layers, experts or operands]
        finite = table[np.isfinite(table)]
        if finite.size:
            values[name] = np.histogram(finite, bins=HISTOGRAM_BINS)
        if name.startswith("fp8/"):
            worst = table.min(axis=0) if METRICS[name].reduction == "min" else table.max(axis=0)
            values |= {f"{name}/{operand}": float(x) for operand, x in zip(FP8_OPERANDS, worst, strict=True)}
    return values


class WandbSink:
    """Sends records to wandb from a thread of its own.

    Args:
        mode: whether to send to a server.
        project: wandb's.
        run_dir: its name is the run's name, its folder `wandb` holds wandb's files.
        run_config: sent as the run's config.
        queue_records: capacity of the queue.
        init_timeout_s: how long wandb may take to reach its server.
        close_timeout_s: how long `close` waits for the thread.
    """

    def __init__(
        self,
        mode: Literal["offline", "online"],
        *,
        project: str,
        run_dir: Path,
        run_config: Mapping[str, Any],
        queue_records: int = QUEUE_RECORDS,
        init_timeout_s: float = 30.0,
        close_timeout_s: float = 30.0,
    ) -> None:
        self._mode: Literal["offline", "online"] = mode
        self._project, self._run_dir, self._run_config = project, run_dir, dict(run_config)
        self._init_timeout_s, self._close_timeout_s = init_timeout_s, close_timeout_s
        self._queue: queue.Queue[Record | None] = queue.Queue(maxsize=queue_records)
        self._off = threading.Event()
        self._one_warning = threading.Lock()
        self._thread = threading.Thread(target=self._mirror, name="wandb mirror", daemon=True)
        self._thread.start()

    @property
    def active(self) -> bool:
        """Whether records still go to wandb."""
        return not self._off.is_set()

    def write(self, record: Record) -> None:
        """Hand over one step record; returns at once."""
        if self.active:
            self._put(_mirrored(record))

    def event(self, event: Record) -> None:
        """Hand over one event; returns at once."""
        names = METRICS if event["event"] == "evaluation" else ("step",)
        self._put({"event": event["event"]} | {name: event[name] for name in names if name in event})

    def close(self) -> None:
        """Let the thread finish, for at most `close_timeout_s`."""
        self._put(None)
        if self.active:
            self._thread.join(self._close_timeout_s)
        if self._thread.is_alive():
            self._turn_off(f"it did not finish within {self._close_timeout_s:g} s")
        self._off.set()

    def _put(self, item: Record | None) -> None:
        if self.active:
            try:
                self._queue.put_nowait(item)
            except queue.Full:
                self._turn_off(f"it is {self._queue.maxsize} records behind")

    def _turn_off(self, reason: str) -> None:
        with self._one_warning:
            if self.active:
                _log.warning("The wandb mirror is off: %s. Training goes on; metrics.jsonl stays complete.", reason)
                self._off.set()

    def _mirror(self) -> None:
        try:
            self._send_all()
        except ModuleNotFoundError as error:
            self._turn_off(f"{error}; install it with `pip install wandb`, or set observe.wandb=off")
        # The one place that goes on after any error: a mirror must never stop the run.
        except Exception as error:  # noqa: BLE001
            self._turn_off(f"{type(error).__name__}: {error}")

    def _send_all(self) -> None:
        import wandb

        mode = self._mode
        if mode == "online" and not wandb.login(prompt=False):
            _log.warning("wandb has no API key: recording offline. `wandb login`, then `wandb sync` the folder.")
            mode = "offline"
        # Made once: a copy of the directory is the same wandb run.
        id_file = self._run_dir / ID_FILE
        if not id_file.is_file():
            write_whole(id_file, f"{secrets.token_hex(8)}\n")
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=self._init_timeout_s, finish_timeout=FINISH_TIMEOUT_S
        )
        run = wandb.init(
            mode=mode,
            project=self._project,
            name=self._run_dir.name,
            dir=self._run_dir,
            config=self._run_config,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            settings=settings,
        )
        run.define_metric("*", step_metric="step")
        for names in OVER_TOKENS:
            run.define_metric(names, step_metric="tokens_seen")
        while self.active and (item := self._queue.get()) is not None:
            if "event" in item:
                run.summary[f"event/{item.pop('event')}"] = item["step"]
                if len(item) > 1:
                    # Into the row of the step just logged; one that a resume scores later is in the summary alone.
                    run.log(item, step=item["step"])
                    run.summary.update({name: value for name, value in item.items() if "/" in name})
            else:
                tables = {name: value for name, value in item.items() if isinstance(value, tuple)}
                histograms = {name: wandb.Histogram(np_histogram=table) for name, table in tables.items()}
                run.log(item | histograms, step=item["step"])
        run.finish()
