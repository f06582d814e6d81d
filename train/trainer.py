"""The training loop: read the schedules, take a step, note it down, save, until the token budget is spent.

A run is determined by its configuration, its seed and three counters (`TrainState`): schedules are pure functions of
step and tokens, data order is a pure function of (seed, position). So a resumed run goes on bit for bit (with
deterministic algorithms and the same thread count).

The host waits for the device when it reads whether the gradients are finite, and again for the record of the step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.cross_entropy import cross_entropy_sum
from train.build import Parts, run_card, store_hashes
from train.checkpoint.dcp import Saver, latest, load
from train.config import PretrainConfig, to_yaml
from train.data.batch import Batch
from train.evaluate.score import bits_per_byte
from train.observe.guards import TerminationGuard, TrainingStopped, check_consecutive_skips
from train.observe.sinks import Sinks, open_sinks
from train.optim.balance import max_violation
from train.optim.schedules import Now, at
from train.state import TrainState
from train.step import StepGradients, apply_update, compute_gradients


class Trainer:
    """One run from its first or last saved step to the end of its token budget.

    `resume` first, then `fit`; both may be called without the other.
    """

    def __init__(self, config: PretrainConfig, parts: Parts) -> None:
        self.config, self.parts = config, parts
        self.directory = Path(config.run.directory) / config.run.name
        self.state = TrainState()
        self.saver = Saver(self.directory / "checkpoints", config.checkpoint)
        self.saved_step: int | None = None
        self.announce_step: int | None = None
        self.changed: dict[str, list[object]] = {}

    def fit(self) -> TrainState:
        """Train until the budget is spent or SIGTERM asks for the end; leaves a checkpoint of the last step.

        Raises:
            TrainingStopped: too many non-finite steps in a row; a checkpoint was saved.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        with open_sinks(self.config.observe, self.directory, run_card(self.config, self.parts)) as sinks:
            changed = {"changed": self.changed} if self.changed else {}
            sinks.event("resume" if self.state.step else "start", step=self.state.step, **changed)
            try:
                with TerminationGuard() as termination:
                    while not (self.budget_is_spent() or termination.requested):
                        self.take_step(sinks)
                    self.finish(sinks)
            finally:
                self.saver.close()
        return self.state

    def take_step(self, sinks: Sinks) -> None:
        """One optimizer step, its record, and a checkpoint when one is due."""
        started = time.perf_counter()
        now = at(self.config.schedule, step=self.state.step, tokens_seen=self.state.tokens_seen)
        batch = self.parts.stream.take(self.state.sequences_seen, now.batch_sequences)
        gradients = compute_gradients(
            self.parts.model,
            self.parts.optimizer,
            list(self.micro_batches(batch)),
            num_targets=batch.num_targets,
            now=now,
        )
        finite = bool(gradients.finite)
        if finite:
            update = self.state.updates + 1
            apply_update(self.parts.model, self.parts.optimizer, gradients, now=now, update=update)
        tokens = batch.input_ids.numel()
        self.state = self.state.advance(sequences=now.batch_sequences, tokens=tokens, finite=finite)
        record = self.record(gradients, now)
        # The losses have been read, so the device has finished the step, optimizer included.
        record["speed/tokens_per_s"] = tokens / (time.perf_counter() - started)
        if self.evaluation_is_due():
            record["eval/bits_per_byte"] = self.evaluate()
        sinks.write(record)
        self.guard(sinks)
        if self.state.step % self.config.checkpoint.every_steps == 0:
            self.save(sinks)

    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """The step's batch in pieces of `micro_batch_sequences`, moved to the device."""
        size, device = self.config.run.micro_batch_sequences, self.parts.device
        ids = batch.document_ids
        for start in range(0, batch.input_ids.shape[0], size):
            piece = slice(start, start + size)
            yield Batch(
                input_ids=batch.input_ids[piece].to(device, non_blocking=True),
                labels=batch.labels[piece].to(device, non_blocking=True),
                document_ids=None if ids is None else ids[piece].to(device, non_blocking=True),
            )

    def record(self, gradients: StepGradients, now: Now) -> dict[str, object]:
        """The step's line in the log; names are declared in `train/observe/metrics.py`."""
        losses = torch.stack(
            (
                gradients.loss_total,
                gradients.loss_main,
                gradients.loss_mtp,
                gradients.loss_balance,
                gradients.grad_norm,
            )
        ).tolist()
        record: dict[str, object] = {
            "step": self.state.step,
            "tokens_seen": self.state.tokens_seen,
            "time_unix_s": time.time(),
            **dict(zip(("loss/total", "loss/main", "loss/mtp", "loss/balance", "grad/norm"), losses, strict=True)),
            "optim/lr": now.lr,
            "schedule/batch_sequences": now.batch_sequences,
            "schedule/bias_speed": now.bias_speed,
            "schedule/mtp_weight": now.mtp_weight,
            "guard/skipped_steps": self.state.skipped_steps,
        }
        if gradients.counts:
            counts = torch.stack([gradients.counts[i] for i in sorted(gradients.counts)])  # [layers, experts]
            record["moe/max_violation_ratio"] = float(max_violation(counts).max())
            load = counts.double() / counts.double().mean(dim=-1, keepdim=True)
            record["moe/expert_load"] = [[round(x, 4) for x in layer] for layer in load.tolist()]
        return record

    def guard(self, sinks: Sinks) -> None:
        """Note a skipped step; after too many in a row save and stop."""
        if not self.state.consecutive_skips:
            return
        sinks.event("skip", step=self.state.step)
        try:
            limit = self.config.run.max_consecutive_nonfinite
            check_consecutive_skips(self.state.consecutive_skips, limit=limit, step=self.state.step)
        except TrainingStopped as stopped:
            self.save(sinks)
            self.published(sinks)
            sinks.event("stop", step=self.state.step, reason=str(stopped))
            raise

    def finish(self, sinks: Sinks) -> None:
        """The last checkpoint, and the word why the loop ended."""
        if self.saved_step != self.state.step:
            self.save(sinks)
        self.published(sinks)
        reason = "token budget spent" if self.budget_is_spent() else "asked to stop; the same command resumes"
        sinks.event("stop", step=self.state.step, reason=reason)

    def budget_is_spent(self) -> bool:
        """Whether the run has seen all its tokens."""
        return self.state.tokens_seen >= self.config.schedule.total_tokens

    def evaluation_is_due(self) -> bool:
        """At the end of the budget, and every `eval_every_steps` when that is set."""
        if self.parts.heldout is None:
            return False
        every = self.config.run.eval_every_steps
        return self.budget_is_spent() or (every > 0 and self.state.step % every == 0)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits per byte of the main model on the held-out store; expert counts and biases stay as they are."""
        assert self.parts.heldout is not None
        return bits_per_byte(
            self.negative_log_likelihood,
            self.parts.heldout,
            sequence_length=self.config.data.sequence_length,
            batch_sequences=self.config.run.micro_batch_sequences,
            mask_documents=self.config.data.mask_documents,
        )

    def negative_log_likelihood(self, batch: Batch) -> tuple[float, int]:
        """Sum over the batch's targets, in nats, and their number."""
        (moved,) = self.micro_batches(batch)
        model = self.parts.model
        logits = model.logits(model.next_token_hidden(moved.input_ids, moved.document_ids))
        return float(cross_entropy_sum(logits.flatten(0, 1), moved.labels.flatten())), batch.num_targets

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the run's state, by name: live tensors, so loading fills them in place."""
        model = {f"model.{name}": tensor for name, tensor in self.parts.model.state_dict().items()}
        optimizer = {f"optim.{name}": tensor for name, tensor in self.parts.optimizer.state_tensors().items()}
        return model | optimizer | {"rng.cpu": torch.get_rng_state()}

    def save(self, sinks: Sinks) -> None:
        """Stage a checkpoint of this step, after the one before it is published; writing goes on behind."""
        self.published(sinks)
        state = {"identity": self.identity(), "config": asdict(self.config), "train_state": self.state.to_json()}
        self.saver.save_async(self.state.step, self.tensors(), state)
        self.saved_step = self.announce_step = self.state.step

    def published(self, sinks: Sinks) -> None:
        """Wait for the save under way, if any, and note it in the log."""
        self.saver.wait()
        if self.announce_step is not None:
            sinks.event("checkpoint", step=self.announce_step)
        self.announce_step = None

    def identity(self) -> dict[str, object]:
        """What must be the same when a checkpoint is taken up again."""
        data = self.config.data
        return {
            "model": asdict(self.config.model),
            "precision": asdict(self.config.precision),
            "store": store_hashes(self.parts.stream.store),
            "seed": self.config.run.seed,
            # The position in the data order counts windows of this length over this stream.
            "data": {name: getattr(data, name) for name in ("sequence_length", "fim_rate", "mask_documents")},
        }

    def resume(self) -> None:
        """Take up the newest whole checkpoint of this run's directory, if there is one.

        Fields that may change between two processes of a run (budget, schedule, batch, threads...) and did are noted
        in the log with the `resume` event.

        Raises:
            ValueError: the checkpoint belongs to another model, precision, store, seed or data order, or
                `run.resume` is off and the directory already holds a run.
        """
        if not self.config.run.resume and any(self.directory.glob("*")):
            raise ValueError(
                f"run.resume=false, but {self.directory} already holds a run; choose another run.name or move it away"
            )
        path = latest(self.directory / "checkpoints")
        if path is None:
            return
        tensors = self.tensors()
        saved = load(path, tensors)
        for key, value in self.identity().items():
            old = saved["identity"].get(key)
            if old != value:
                raise ValueError(
                    f"{path} was saved with another {key}: {_difference(old, value)}; "
                    "choose another run.name, or give back the old value"
                )
        torch.set_rng_state(tensors["rng.cpu"])
        self.state = TrainState.from_json(saved["train_state"])
        self.saved_step = self.state.step
        self.changed = _changed_fields(saved["config"], _as_json(asdict(self.config)))


def _difference(old: object, new: object) -> str:
    """The first field in which two values differ, or the values themselves."""
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in (*new, *old) if old.get(key) != new.get(key))
        return f"{key} was {old.get(key)}, now {new.get(key)}"
    return f"was {old}, now {new}"


def _as_json(value: object) -> Any:
    """The value as it comes back from a JSON file: tuples become lists."""
    return json.loads(json.dumps(value))


def _changed_fields(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[object]]:
    """`section.field` -> [old, new], for every field that differs."""
    pairs = {
        f"{section}.{name}": [old.get(section, {}).get(name), value]
        for section, fields in new.items()
        for name, value in fields.items()
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
