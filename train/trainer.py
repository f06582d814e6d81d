"""The training loop: read the schedules, take a step, note it down, save, until the token budget is spent.

A run is determined by its configuration, its seed and three counters (`TrainState`): schedules are pure functions of
step and tokens, data order is a pure function of (seed, position). So a resumed run goes on bit for bit (with
deterministic algorithms, the same thread count and the same layout; on another layout it goes on from the same state).

Every rank runs this loop in step with the others. Data rank d takes the d-th share of each batch; ranks of one pipeline
take the same share. What all must decide alike (skip, stop) is read from numbers that were summed over all ranks. The
first rank alone writes the log and the run's files.

The host waits for the device when it reads whether the gradients are finite, and again for the record of the step.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.cross_entropy import cross_entropy_sum
from parallel.collectives import sum_over
from parallel.consensus import refuse_together
from parallel.shards import LocalShard
from train.assemble import (
    Parts,
    checkpoint_tensors,
    device_name,
    run_card,
    store_hashes,
)
from train.checkpoint.dcp import Saver, latest, load
from train.checkpoint.identity import check_same_identity, without_defaults
from train.checkpoint.publish import published
from train.config import PretrainConfig, to_yaml
from train.data.batch import Batch
from train.evaluate.score import score_store
from train.model.sizes import model_flops_per_token
from train.observe.fp8_health import Fp8Health
from train.observe.guards import DeadExpertGuard, TerminationGuard, TrainingStopped, check_consecutive_skips
from train.observe.metrics import Record, dead_experts, dense_bf16_peak, step_record
from train.observe.sinks import NoSinks, Sinks, open_sinks
from train.schedules import Now, at
from train.stage import Stage
from train.state import TrainState
from train.step import StepGradients, apply_update, compute_gradients, expert_biases


class Trainer:
    """One run from its first or last saved step to the end of its token budget.

    `resume` first, then `fit`; both may be called without the other.
    """

    def __init__(self, config: PretrainConfig, parts: Parts) -> None:
        self.config, self.parts, self.engine = config, parts, parts.engine
        self.mesh = parts.engine.mesh
        self.directory = Path(config.run.directory) / config.run.name
        self.state = TrainState()
        self.saver = Saver(self.directory / "checkpoints", config.checkpoint, group=parts.checkpoint_group)
        self.saved_step: int | None = None
        self.announce_step: int | None = None
        self.stop_agreed = False
        self.changed: dict[str, list[object]] = {}
        self.dead_experts = DeadExpertGuard(config.observe.dead_expert_steps)
        self.peak_flops = config.observe.peak_flops or dense_bf16_peak(device_name(self.mesh.device))
        self.flops_per_token = model_flops_per_token(config.model, sequence_length=config.data.sequence_length)

    def fit(self) -> TrainState:
        """Train until the budget is spent or SIGTERM asks for the end; leaves a checkpoint of the last step.

        Raises:
            TrainingStopped: too many non-finite steps in a row; a checkpoint was saved.
        """
        with self.open_sinks() as sinks:
            changed = {"changed": self.changed} if self.changed else {}
            sinks.event("resume" if self.state.step else "start", step=self.state.step, **changed)
            try:
                with TerminationGuard() as termination:
                    while not (self.budget_is_spent() or self.stop_agreed):
                        self.take_step(sinks, stop=termination.requested)
                        # One process need not ask the others.
                        self.stop_agreed |= termination.requested and self.mesh.world.size == 1
                    self.finish(sinks)
            finally:
                self.saver.close()
                if self.engine.ema:
                    self.engine.ema.close()
        return self.state

    def open_sinks(self) -> Sinks | NoSinks:
        """The run's log on the first rank, nothing on the others."""
        if self.mesh.rank > 0:
            return NoSinks()
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        card = run_card(self.config, self.parts)
        return open_sinks(self.config.observe, self.directory, card, asdict(self.config))

    def take_step(self, sinks: Sinks | NoSinks, *, stop: bool = False) -> None:
        """One optimizer step, its record, and a checkpoint when one is due.

        Args:
            sinks: where the record goes.
            stop: whether this rank was asked to stop; all ranks stop after the step in which any of them was.
        """
        started = time.perf_counter()
        now = at(self.config.schedule, step=self.state.step, tokens_seen=self.state.tokens_seen)
        share = now.batch_sequences // self.mesh.dp.size
        batch = self.parts.stream.take(self.state.sequences_seen + self.mesh.dp.rank * share, share)
        health = self.new_health()
        gradients = compute_gradients(
            self.engine,
            batch,
            num_micro_batches=share // self.config.run.micro_batch_sequences,
            now=now,
            stop=stop,
            health=health,
        )
        finite, self.stop_agreed = torch.stack((gradients.finite, gradients.stop)).tolist()
        if finite:
            apply_update(self.engine, gradients, now=now, update=self.state.updates + 1)
        tokens = now.batch_sequences * self.config.data.sequence_length
        self.state = self.state.advance(sequences=now.batch_sequences, tokens=tokens, finite=finite)
        record = self.record(gradients, now)
        # The losses have been read, so the device has finished the step, optimizer included.
        record |= self.speed(tokens / (time.perf_counter() - started))
        record |= self.tables(health)
        if self.evaluation_is_due():
            record["eval/bits_per_byte"] = self.evaluate()
        is_new = sinks.write(record)
        dead = self.dead_experts.note(dead_experts(gradients.counts))
        # A step that is repeated after a resume has told of them before.
        if dead and is_new:
            steps = self.config.observe.dead_expert_steps
            sinks.event("dead_experts", step=self.state.step, steps=steps, experts=dead)
        self.guard(sinks)
        if self.state.step % self.config.checkpoint.every_steps == 0:
            self.save(sinks)

    def new_health(self) -> Fp8Health | None:
        """What samples the operands of the step that comes, where it is due and FP8."""
        due = self.config.observe.due(self.state.step + 1, self.config.observe.fp8_health_every_steps)
        if self.config.precision.name != "fp8" or not due:
            return None
        return Fp8Health(self.config.model, self.engine.models, self.mesh.device)

    def record(self, gradients: StepGradients, now: Now) -> Record:
        """The step's line in the log; names are declared in `train/observe/metrics.py`."""
        losses = {
            "loss/total": gradients.loss_total,
            "loss/main": gradients.loss_main,
            "loss/mtp": gradients.loss_mtp,
            "loss/balance": gradients.loss_balance,
            "grad/norm": gradients.grad_norm,
        }
        return step_record(self.state, now, losses, gradients.counts)

    def speed(self, tokens_per_s: float) -> Record:
        """Throughput of the step and, where the peak of the device is known, its share of it."""
        record: Record = {"speed/tokens_per_s": tokens_per_s}
        if self.peak_flops is not None:
            peak = self.peak_flops * self.mesh.world.size
            record["speed/mfu_ratio"] = tokens_per_s * self.flops_per_token / peak
        return record

    def tables(self, health: Fp8Health | None) -> Record:
        """What only some steps log: experts' biases and the health of FP8; every rank takes part."""
        observe = self.config.observe
        record: Record = {} if health is None else dict(health.tables())
        if observe.due(self.state.step, observe.bias_every_steps):
            biases = expert_biases(self.engine).tolist()
            record |= {"moe/expert_bias": [[float(f"{x:.6g}") for x in layer] for layer in biases]} if biases else {}
        return record

    def guard(self, sinks: Sinks | NoSinks) -> None:
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

    def finish(self, sinks: Sinks | NoSinks) -> None:
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
        return score_store(
            self.negative_log_likelihood,
            self.parts.heldout,
            sequence_length=self.config.data.sequence_length,
            batch_sequences=self.config.run.micro_batch_sequences * self.mesh.dp.size,
            mask_documents=self.config.data.mask_documents,
        ).bits_per_byte

    def negative_log_likelihood(self, batch: Batch) -> tuple[float, int]:
        """Sum over the batch's targets, in nats, and their number; each data rank scores its share."""
        share = batch.share(self.mesh.dp.rank, self.mesh.dp.size)
        inputs = share.inputs(self.mesh.device)

        def forward(stage: nn.Module, inbound: Tensor | None) -> Tensor:
            assert isinstance(stage, Stage)
            hidden = stage.model.next_token_hidden(inputs["input_ids"], inputs.get("document_ids"), inbound)
            if not stage.model.part.ends:
                return hidden
            return cross_entropy_sum(stage.model.logits(hidden).flatten(0, 1), inputs["labels"].flatten()).double()

        scored = self.engine.pipeline.relay(inputs, forward)
        nats = torch.zeros((), dtype=torch.float64, device=self.mesh.device) if scored is None else scored
        return float(sum_over(nats, self.mesh.world)), batch.num_targets

    def tensors(self) -> dict[str, Tensor | LocalShard]:
        """This rank's part of the run's state, by name: live tensors, so loading fills them in place."""
        return checkpoint_tensors(self.engine) | {"rng.cpu": torch.get_rng_state()}

    def save(self, sinks: Sinks | NoSinks) -> None:
        """Stage a checkpoint of this step, after the one before it is published; writing goes on behind."""
        self.published(sinks)
        state = {"identity": self.identity(), "config": asdict(self.config), "train_state": self.state.to_json()}
        self.saver.save_async(self.state.step, self.tensors(), state)
        self.saved_step = self.announce_step = self.state.step

    def published(self, sinks: Sinks | NoSinks) -> None:
        """Wait for the save under way, if any, and note it in the log."""
        self.saver.wait()
        if self.announce_step is not None:
            sinks.event("checkpoint", step=self.announce_step)
        self.announce_step = None

    def identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed; fields at their defaults are left out."""
        config, data = self.config, asdict(self.config.data)
        identity = {
            "model": asdict(config.model),
            "precision": asdict(config.precision),
            "store": store_hashes(self.parts.stream.store),
            "seed": config.run.seed,
            # The position in the data order counts windows of this length over this stream.
            "data": {name: data[name] for name in ("sequence_length", "fim_rate", "mask_documents")},
        }
        return without_defaults(identity)

    def resume(self) -> None:
        """Take up the newest whole checkpoint of this run's directory, if there is one.

        Fields that may change between two processes of a run (budget, schedule, batch, threads...) and did are noted
        in the log with the `resume` event.

        Raises:
            ValueError: the checkpoint belongs to another model, precision, store, seed or data order, or
                `run.resume` is off and the directory already holds a run.
        """
        self._refuse_an_old_run()
        path = latest(self.directory / "checkpoints", group=self.parts.checkpoint_group)
        if path is None:
            self._refuse_drawn_weights()
            return
        tensors = self.tensors()
        saved = load(path, tensors, group=self.parts.checkpoint_group)
        check_same_identity(path, saved["identity"], self.identity())
        generator_state = tensors["rng.cpu"]
        assert isinstance(generator_state, Tensor)
        torch.set_rng_state(generator_state)
        self.state = TrainState.from_json(saved["train_state"])
        self.saved_step = self.state.step
        self.changed = changed_fields(saved["config"], self.config)

    def _refuse_an_old_run(self) -> None:
        """With `run.resume=false`."""

        def reason() -> str | None:
            if self.config.run.resume or not any(self.directory.glob("*")):
                return None
            return (
                f"run.resume=false, but {self.directory} already holds a run; choose another run.name or move it away"
            )

        refuse_together(self.parts.checkpoint_group, reason)

    def _refuse_drawn_weights(self) -> None:
        """With `run.init_from`: weights were not read, because there are checkpoints, but none of them is whole."""

        def reason() -> str | None:
            if self.config.run.init_from is None or not published(self.directory / "checkpoints"):
                return None
            return (
                f"every checkpoint in {self.directory / 'checkpoints'} is damaged; move them away to begin again with "
                f"the weights of run.init_from={self.config.run.init_from}"
            )

        refuse_together(self.parts.checkpoint_group, reason)


def changed_fields(old: dict[str, Any], config: PretrainConfig) -> dict[str, list[object]]:
    """`section.field` -> [old, new], for every field in which a configuration differs from a saved one."""
    # As it comes back from a file: tuples become lists.
    new = json.loads(json.dumps(asdict(config)))
    pairs = {
        f"{section}.{name}": [(old.get(section) or {}).get(name), value]
        for section, fields in new.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
