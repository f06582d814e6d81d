"""The training loop: read the schedules, take a step, log it, save, until the token budget is spent.

A run is determined by its configuration, its seed and three counters (`TrainState`): schedules are pure functions of
step and tokens, data order is a pure function of (seed, position). A resumed run continues bit for bit (with
deterministic algorithms, the same thread count and the same layout; on another layout from the same state).

Every rank runs this loop in step with the others. Data rank d takes the d-th share of each batch; ranks of one pipeline
take the same share. Decisions of all ranks (skip, stop) are read from numbers that were summed over all of them. Rank 0
alone writes the log and the run's files.

The host waits for the device when it reads whether loss and gradients are finite and in the band (`train/spikes.py`),
and again for the record of the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parallel.collectives import sum_over
from parallel.consensus import GroupTransport, Ranks, refuse_together
from parallel.grads import nonfinite_gradients
from parallel.shards import LocalShard
from parallel.waiting import BusyTime
from train.assemble import Components, device_name, run_card
from train.checkpoint.dcp import SaveFailed, Saver, latest, load
from train.checkpoint.identity import SavedState, changed_fields, check_same_identity, read_state, without_defaults
from train.checkpoint.lineage import BEGAN_FROM
from train.checkpoint.publish import step_of
from train.config import PretrainConfig, to_yaml
from train.data.batch import Batch
from train.data.blocks import DamagedData
from train.data.store import store_hashes
from train.data.whole_file import write_whole
from train.data.windows import position_of, union
from train.evaluate.score import score_store
from train.model.attention import LATENT_NORM_EPS
from train.model.sizes import model_flops_per_token
from train.observe.fp8_health import Fp8Health
from train.observe.guards import (
    AskedToStop,
    CheckpointAge,
    DataRefused,
    DeadExpertGuard,
    Diverged,
    SavesFailed,
    SpeedGuard,
    StragglerGuard,
    TerminationGuard,
    TrainingStopped,
    check_any_applied,
    check_consecutive_skips,
    diverged,
)
from train.observe.metrics import (
    PHASES,
    Record,
    Speed,
    bias_table,
    busy_tables,
    dead_experts,
    dense_bf16_peak,
    logit_table,
    step_record,
)
from train.observe.sentences import closing, opening
from train.observe.sinks import PLAN_FILE, NoSinks, Sinks, open_sinks
from train.optim.balance import expert_biases
from train.run_directory import CHECKPOINTS, LOCK, run_directory
from train.schedules import scheduled_values, steps_to_go
from train.spikes import Score, SpikeState, rollback_order
from train.stage import Stage
from train.state import TrainState
from train.step import apply_update, checkpoint_tensors, compute_gradients


class Trainer:
    """One run from its first or last saved step to the end of its token budget.

    `resume` first, then `fit`; both may be called without the other. On rank 0 `after_step` is called once a step is
    logged, before it is saved; it may read what is there, and log.
    """

    def __init__(
        self,
        config: PretrainConfig,
        components: Components,
        after_step: Callable[[Trainer, Sinks], None] = lambda *_: None,
    ) -> None:
        self.config, self.components, self.engine = config, components, components.engine
        self.after_step = after_step
        self.mesh = components.engine.mesh
        self.directory = run_directory(config.run)
        self.state, self.spikes = TrainState(), SpikeState()
        self.dead_experts = DeadExpertGuard(config.observe.dead_expert_steps)
        self.stragglers = StragglerGuard(config.observe.straggler_ratio, config.observe.straggler_steps)
        self.busy, self.busy_s = BusyTime(self.mesh.device), [0.0] * len(PHASES)
        peak = config.observe.peak_flops or dense_bf16_peak(device_name(self.mesh.device))
        self.saver = Saver(self.directory / CHECKPOINTS, config.checkpoint, group=components.checkpoint_group)
        flops = model_flops_per_token(config.model, sequence_length=config.data.sequence_length)
        self.speed = Speed(flops, peak, self.mesh.world.size)
        self.saved_step: int | None = None
        # Saved, and not known to be published.
        self.announce_step: int | None = None
        self.checkpoint_age = CheckpointAge(config.observe.stale_checkpoint_s)
        self.speed_guard = SpeedGuard()
        self.last_record: Record = {}
        self.failed_saves = 0
        self.quarantines = 0
        self.stop_agreed, self.is_unscored = False, False
        self.termination = TerminationGuard()
        self.changed: dict[str, list[object]] = {}
        self.began_from = components.began_from

    def fit(self) -> TrainState:
        """Train until the budget is spent or SIGTERM asks for the end; leaves a checkpoint of the last step.

        Raises:
            TrainingStopped: too many non-finite steps in a row, or no step was ever applied; a checkpoint was saved.
            SavesFailed: `checkpoint.max_failed_saves` in a row failed.
            Diverged: the loss left its band and did not come back.
            DataRefused: token data are damaged; a checkpoint was saved.
        """
        with self.open_sinks() as sinks, self.termination:
            changed = {"changed": self.changed} if self.changed else {}
            if isinstance(sinks, Sinks):
                sinks.say(self.opening())
            inexact = {} if not self.state.step or self.config.run.deterministic else {"deterministic": False}
            sinks.event("resume" if self.state.step else "start", step=self.state.step, **changed, **inexact)
            self.checkpoint_age.published()
            try:
                reason = self.train(sinks)
                sinks.event("stop", step=self.state.step, reason=reason)
            except TrainingStopped as stopped:
                sinks.event("stop", step=self.state.step, reason=str(stopped), exit_code=stopped.exit_code)
                raise
            finally:
                self.saver.close()
                if self.engine.ema:
                    self.engine.ema.close()
            if isinstance(sinks, Sinks):
                sinks.say(self.closing(sinks))
        return self.state

    def train(self, sinks: Sinks | NoSinks) -> str:
        """Step after step, and the last checkpoint; returns why it ended, and raises as `fit`."""
        try:
            # Asked while the model was built or a checkpoint read.
            self.stop_agreed = self.holds_on_a_rank(self.termination.requested)
            # The process that took the step may have died before it was scored.
            if self.evaluation_is_due() and self.holds_on_a_rank(sinks.lacks_evaluation(self.state.step)):
                self.log_evaluation(sinks)
            while not (self.budget_is_spent() or self.stop_agreed):
                self.take_step(sinks)
                # One process need not ask the others.
                self.stop_agreed |= self.termination.requested and self.mesh.world.size == 1
            check_any_applied(self.state.step, updates=self.state.updates, ended=self.budget_is_spent())
        except (SavesFailed, Diverged):
            raise
        except TrainingStopped:
            self.save_last(sinks)
            raise
        self.save_last(sinks)
        if not self.budget_is_spent():
            return "asked to stop; the same command resumes"
        unscored = "; asked to stop before the held-out text was scored: the same command scores it"
        return f"token budget spent{unscored * self.is_unscored}"

    def open_sinks(self) -> Sinks | NoSinks:
        """The run's log on the first rank, nothing on the others."""
        if self.mesh.rank > 0:
            return NoSinks()
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(self.directory / "config.yaml", to_yaml(self.config))
        return open_sinks(self.config.observe, self.directory, self.run_card(), asdict(self.config))

    def opening(self) -> list[str]:
        """What the run is, for the console."""
        schedule, state = self.config.schedule, self.state
        steps = steps_to_go(schedule, sequence_length=self.config.data.sequence_length, tokens_seen=state.tokens_seen)
        every = self.config.checkpoint.every_steps
        return opening(
            self.run_card(), directory=self.directory, num_steps=state.step + steps, step=state.step, every_steps=every
        )

    def closing(self, sinks: Sinks) -> list[str]:
        """What came out of it and what can be done with it, for the console."""
        return closing(
            self.directory,
            last=self.last_record,
            scores=sinks.jsonl.evaluated,
            tokens_per_s=self.speed_guard.median,
            heldout=self.config.data.heldout,
        )

    def run_card(self) -> dict[str, Any]:
        """What the run is, what it began from, and how many sequences it left out, if any."""
        dropped = sum(count for _, count in self.spikes.dropped)
        left_out = {"dropped_sequences": dropped} if dropped else {}
        return run_card(self.config, self.components) | self.lineage() | left_out

    def lineage(self) -> dict[str, Any]:
        """What it began from, by name, where weights were another run's."""
        return {BEGAN_FROM: self.began_from} if self.began_from else {}

    def take_step(self, sinks: Sinks | NoSinks) -> None:
        """One optimizer step, its record, and a checkpoint when one is due; or, of a damaged batch, its quarantine.

        All ranks stop after the step before which any of them was asked to, one process after that in which it was.

        Raises:
            TrainingStopped: too many steps in a row were skipped.
            Diverged: as `fit`.
            DataRefused: as `quarantine`.
        """
        started = time.perf_counter()
        self.busy.start()
        config, observe = self.config, self.config.observe
        now = scheduled_values(config.schedule, step=self.state.step, tokens_seen=self.state.tokens_seen)
        share = now.batch_sequences // self.mesh.dp.size
        first = self.state.sequences_seen
        position = position_of(first, self.spikes.dropped)
        end = position_of(first + now.batch_sequences - 1, self.spikes.dropped) + 1
        self.components.stream.dropped = self.spikes.dropped
        batch = self.components.stream.take(first + self.mesh.dp.rank * share, share)
        self.busy.end_phase()
        health = self.fp8_health()
        gradients = compute_gradients(
            self.engine,
            batch,
            num_micro_batches=share // config.run.micro_batch_sequences,
            now=now,
            stop=self.termination.requested,
            busy_s=self.busy_s,
            health=health,
        )
        *flags, loss, norm = gradients.verdict.tolist()
        self.busy.end_phase()
        finite, self.stop_agreed, is_damaged = map(bool, flags)
        if is_damaged:
            self.quarantine(batch, sinks)
            return
        self.quarantines = 0
        score = self.spikes.score(config.spikes, loss=loss, norm=norm) if finite else None
        if applied := finite and not (score and score.is_spike):
            apply_update(self.engine, gradients, now=now, update=self.state.updates + 1)
            self.spikes = self.spikes.after_applied(config.spikes, position=position, loss=loss, norm=norm)
        else:
            self.spikes = self.spikes.after_skipped(step=self.state.step + 1, is_spike=finite)
        tokens = now.batch_sequences * config.data.sequence_length
        self.state = self.state.advance(sequences=now.batch_sequences, tokens=tokens, finite=finite, applied=applied)

        record = step_record(self.state, now, gradients.logged, gradients.counts)
        # The losses have been read, so the device has finished the step, optimizer included.
        record |= self.speed.record(tokens / (time.perf_counter() - started))
        self.busy_s = self.busy.stop()
        # Of the step before.
        record |= busy_tables(gradients.busy_us, data_ranks=self.mesh.dp.size)
        record |= logit_table(gradients.max_logits)
        # Tables of some steps only; every rank takes part.
        if health is not None:
            record |= health.tables()
        if observe.due(self.state.step, observe.bias_every_steps):
            record |= bias_table(expert_biases(self.engine.models, self.mesh))
        is_new = sinks.write(record)
        self.last_record = record
        dead = self.dead_experts.note(dead_experts(gradients.counts))
        # A step that is repeated after a resume has logged them before.
        if dead and is_new:
            sinks.event("dead_experts", step=self.state.step, steps=observe.dead_expert_steps, experts=dead)
        self.log_stragglers(sinks, record)
        self.log_watch(sinks, record["speed/tokens_per_s"])
        if not applied:
            self.log_skipped(sinks, score, loss=loss, norm=norm, positions=[position, end])
        if self.spikes.in_a_row >= config.spikes.max_skips or self.spikes.has_risen(config.spikes):
            self.go_back(sinks, spike_end=end, batch_sequences=now.batch_sequences)
        else:
            self.save_and_evaluate(sinks)

    def log_skipped(
        self, sinks: Sinks | NoSinks, score: Score | None, *, loss: float, norm: float, positions: list[int]
    ) -> None:
        """Say why a step was not applied: its loss or a gradient is not finite, or `score` calls it a spike.

        Raises:
            TrainingStopped: too many steps in a row were not finite.
        """
        if score:
            values = {"loss": loss, "norm": norm, "loss_z": score.loss_z, "norm_z": score.norm_z}
            sinks.event("spike", step=self.state.step, positions=positions, **values)
            return
        found = nonfinite_gradients(self.engine.optimizer.buckets, self.mesh.world, device=self.mesh.device)
        sinks.event("skip", step=self.state.step, nonfinite=[asdict(each) for each in found])
        limit = self.config.run.max_consecutive_nonfinite
        check_consecutive_skips(self.state.consecutive_skips, limit=limit, step=self.state.step)

    def save_and_evaluate(self, sinks: Sinks | NoSinks) -> None:
        """What is due after a step."""
        self.spikes = self.spikes.proven(self.config.spikes, step=self.state.step)
        is_due = self.state.step % self.config.checkpoint.every_steps == 0
        if is_due and self.config.spikes.window_steps:
            self.spikes = self.spikes.after_save(self.state.step)
        if is_due or self.budget_is_spent():
            self.save(sinks)
        if self.evaluation_is_due():
            # Nothing slow stands between the last update and the disk.
            if self.budget_is_spent():
                self.wait_for_save(sinks)
            self.log_evaluation(sinks)

    def log_stragglers(self, sinks: Sinks | NoSinks, record: Record) -> None:
        """Name the ranks that have become slow, by each rank's work in the step before, and their longest phase."""
        found = []
        for slow in self.stragglers.note(record.get("step/busy_ms", [])):
            times_ms = {phase: record[f"step/{phase}_ms"][slow.pipeline_rank][slow.data_rank] for phase in PHASES}
            found.append(asdict(slow) | {"phase": max(PHASES, key=times_ms.__getitem__)})
        sinks.events("straggler", found, step=self.state.step)

    def log_watch(self, sinks: Sinks | NoSinks, tokens_per_s: float) -> None:
        """Look after each step at checkpoints (just published, or none for long) and speed; then `after_step`."""
        self.log_published(sinks)
        if (age_s := self.checkpoint_age.note()) is not None:
            sinks.event("stale_checkpoint", step=self.state.step, age_s=age_s)
        if self.speed_guard.note(tokens_per_s):
            speeds = {"tokens_per_s": tokens_per_s, "best_tokens_per_s": self.speed_guard.best}
            sinks.event("low_speed", step=self.state.step, **speeds)
        if isinstance(sinks, Sinks):
            self.after_step(self, sinks)

    def go_back(self, sinks: Sinks | NoSinks, *, spike_end: int, batch_sequences: int) -> None:
        """Take up the last good checkpoint without the data around the spikes; later checkpoints are deleted.

        Raises:
            Diverged: there is none, or no whole one; it has helped too often already; or the loss has risen slowly.
        """
        left_at, spikes, policy = self.state.step, self.spikes, self.config.spikes
        self.wait_for_save(sinks)
        order = partial(rollback_order, state=spikes, every_steps=self.config.checkpoint.every_steps)
        try:
            path = latest(self.directory / CHECKPOINTS, group=self.components.checkpoint_group, order=order)
        except ValueError as damage:
            raise Diverged(f"step {left_at}: the loss left its band, and of those from before {damage}") from damage
        rises = spikes.has_risen(policy)
        if path is None or rises or spikes.rollbacks >= policy.max_rollbacks:
            raise diverged(left_at, path, rollbacks=spikes.rollbacks, rises=rises)
        # A process that takes over must find no later one.
        self.saver.drop_newer(step_of(path))
        self.restore(path)
        self.spikes = spikes.rolled_back(
            self.spikes,
            left_at=left_at,
            step=self.state.step,
            resumes_at=position_of(self.state.sequences_seen, self.spikes.dropped),
            spike_end=spike_end,
            batch_sequences=batch_sequences,
        )
        self.dead_experts = DeadExpertGuard(self.config.observe.dead_expert_steps)
        dropped = [list(window) for window in self.spikes.dropped]
        sinks.event("rollback", step=self.state.step, left_at_step=left_at, dropped_positions=dropped)
        sinks.write_card(self.run_card())
        # So that a process that takes over leaves out the same data.
        self.save(sinks)

    def fp8_health(self) -> Fp8Health | None:
        """What observes the coming step, where it is due."""
        observe = self.config.observe
        if self.config.precision.name == "fp8" and observe.due(self.state.step + 1, observe.fp8_health_every_steps):
            return Fp8Health(self.config.model, self.engine.models, self.mesh.device)
        return None

    def quarantine(self, batch: Batch, sinks: Sinks | NoSinks) -> None:
        """Leave the damaged samples of the coming step, of all ranks, out of the data order; a collective call.

        Raises:
            DataRefused: `data.on_damage` is refuse, or it does not end.
        """
        # The saves use the same group.
        self.wait_for_save(sinks)
        ranks = Ranks(GroupTransport(self.components.checkpoint_group))
        reports = ranks.agree(lambda: [asdict(each) for each in batch.damaged], lambda found: [found] * len(found))
        # Ranks of a pipeline read the same samples.
        by_position = {each["position"]: each for report in reports for each in report}
        windows = [by_position[position] for position in sorted(by_position)]
        if self.config.data.on_damage == "refuse":
            raise DataRefused(f"{windows[0]['error']}. data.on_damage=quarantine goes on without such samples")
        self.quarantines += 1
        if self.quarantines >= self.config.run.max_consecutive_nonfinite:
            raise DataRefused(f"{windows[0]['error']}. Batches were damaged {self.quarantines} times in a row")
        dropped = union((*self.spikes.dropped, *((each, 1) for each in by_position)))
        self.spikes = replace(self.spikes, dropped=dropped)
        sinks.event("quarantine", step=self.state.step, windows=windows)
        sinks.write_card(self.run_card())

    def budget_is_spent(self) -> bool:
        """Whether the run has seen all its tokens."""
        return self.state.tokens_seen >= self.config.schedule.total_tokens

    def evaluation_is_due(self) -> bool:
        """At the end of the budget, and every `eval_every_steps` when that is set."""
        every = self.config.run.eval_every_steps
        due = self.budget_is_spent() or (every > 0 and self.state.step % every == 0)
        return due and self.state.step > 0 and self.components.heldout is not None

    def holds_on_a_rank(self, holds: bool) -> bool:
        """Whether something that one rank knows, such as a signal or its log, holds on any; a collective call."""
        return bool(sum_over(torch.tensor(int(holds), device=self.mesh.device), self.mesh.world))

    def log_evaluation(self, sinks: Sinks | NoSinks) -> None:
        """Score the held-out store with the weights of now, unless asked to stop; DataRefused if it is damaged."""
        self.is_unscored = True
        if self.stop_agreed:
            return
        try:
            scores = {"eval/bits_per_byte": self.evaluate()}
        except DamagedData as damage:
            raise DataRefused(str(damage)) from None
        except AskedToStop:
            self.stop_agreed = True
            return
        self.is_unscored = False
        self.log_published(sinks)
        sinks.event("evaluation", step=self.state.step, tokens_seen=self.state.tokens_seen, **scores)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits per byte of the main model on the held-out store; expert counts and biases stay as they are.

        Raises:
            AskedToStop: on all ranks, between two batches.
        """
        assert self.components.heldout is not None
        return score_store(
            self.negative_log_likelihood,
            self.components.heldout,
            sequence_length=self.config.data.sequence_length,
            batch_sequences=self.config.run.micro_batch_sequences * self.mesh.dp.size,
            mask_documents=self.config.data.mask_documents,
        ).bits_per_byte

    def negative_log_likelihood(self, batch: Batch) -> tuple[float, int]:
        """Sum over the batch's targets, in nats, and their number; each data rank scores its share.

        Raises:
            AskedToStop: some rank was.
        """
        share = batch.share(self.mesh.dp.rank, self.mesh.dp.size)
        inputs = share.inputs(self.mesh.device)

        def forward(stage: nn.Module, inbound: Tensor | None) -> Tensor:
            assert isinstance(stage, Stage)
            hidden = stage.model.next_token_hidden(inputs["input_ids"], inputs.get("document_ids"), inbound)
            if not stage.model.spec.is_last:
                return hidden
            return stage.model.cross_entropy(hidden, inputs["labels"]).double()

        scored = self.engine.pipeline.relay(inputs, forward)
        nats = torch.zeros((), dtype=torch.float64, device=self.mesh.device) if scored is None else scored
        # The ranks agree on a stop in the sum that each batch has anyway.
        stop = torch.tensor(self.termination.requested, device=self.mesh.device)
        total, num_stops = sum_over(torch.stack((nats, stop.double())), self.mesh.world).tolist()
        if num_stops:
            raise AskedToStop
        return total, batch.num_targets

    def tensors(self) -> dict[str, Tensor | LocalShard]:
        """This rank's part of the run's state, by name: live tensors, as `checkpoint_tensors`."""
        return checkpoint_tensors(self.engine) | {"rng.cpu": torch.get_rng_state()}

    def save(self, sinks: Sinks | NoSinks) -> None:
        """Stage a checkpoint of this step, after the one before it is published; writing goes on behind.

        Raises:
            SavesFailed: as `wait_for_save`.
        """
        self.wait_for_save(sinks)
        counters = {"train_state": self.state.to_json(), "spikes": self.spikes.to_json()}
        state = {"identity": self.identity(), "config": asdict(self.config), **counters, **self.lineage()}
        with self.failures_counted(sinks):
            stay = self.spikes.stay(self.state.step)
            with self.engine.optimizer.whole_weights():
                self.saver.save_async(self.state.step, self.tensors(), state, stay=stay)
            self.saved_step = self.announce_step = self.state.step
            self.log_published(sinks)

    def log_published(self, sinks: Sinks | NoSinks) -> None:
        """Log the last checkpoint if it has been published meanwhile; waits for nothing."""
        if self.announce_step is not None and self.saver.is_published:
            sinks.event("checkpoint", step=self.announce_step)
            self.checkpoint_age.published()
            self.announce_step, self.failed_saves = None, 0

    def wait_for_save(self, sinks: Sinks | NoSinks) -> None:
        """Wait for the save under way, if any, and log it.

        Raises:
            SavesFailed: it failed, and so did `checkpoint.max_failed_saves` in a row.
        """
        with self.failures_counted(sinks):
            self.saver.wait()
            self.log_published(sinks)

    @contextmanager
    def failures_counted(self, sinks: Sinks | NoSinks) -> Iterator[None]:
        """Log a failed save and go on, up to the limit: a disk may be full for a while only."""
        try:
            yield
        except SaveFailed as error:
            self.saved_step = self.announce_step = None
            self.failed_saves += 1
            sinks.event("save_failed", step=self.state.step, error=str(error))
            if self.failed_saves >= self.config.checkpoint.max_failed_saves:
                raise SavesFailed(f"{error}. This was save {self.failed_saves} of that kind in a row") from error

    def save_last(self, sinks: Sinks | NoSinks) -> None:
        """Save this step, again if that fails."""
        self.wait_for_save(sinks)
        # Before the first step there is nothing to save.
        while self.state.step and self.saved_step != self.state.step:
            self.save(sinks)
            self.wait_for_save(sinks)

    def identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed (`train/checkpoint/identity.py`)."""
        config, data = self.config, asdict(self.config.data)
        identity = {
            "model": asdict(config.model),
            # Where weights are kept changes no bit.
            "precision": asdict(replace(config.precision, keep_bf16_weights=True)),
            "store": store_hashes(self.components.stream.store),
            "seed": config.run.seed,
            # The position in the data order counts windows of this length over this stream.
            "data": {name: data[name] for name in ("sequence_length", "fim_rate", "mask_documents", "samples")},
        }
        if chat := self.components.stream.store.manifest.chat:
            identity["first_token"] = chat.first_token
        if config.model.rms_norm_eps != LATENT_NORM_EPS:
            # Older versions trained such a run with `rms_norm_eps` in the latents' norms too.
            identity["latent_norm_eps"] = LATENT_NORM_EPS
        return without_defaults(identity)

    def resume(self) -> None:
        """Continue from the newest whole checkpoint of this run's directory, if there is one.

        Fields that may change between two processes of a run (budget, schedule, batch, threads...) and did are logged
        with the `resume` event.

        Raises:
            ValueError: the checkpoint belongs to another model, precision, store, seed or data order; every checkpoint
                is damaged; or `run.resume` is off and the directory already holds a run.
        """
        group = self.components.checkpoint_group
        if not self.config.run.resume:
            in_use = f"{self.directory} already holds a run; choose another run.name or move it away"
            others = (path for path in self.directory.glob("*") if path.name not in (LOCK, PLAN_FILE))
            refuse_together(group, lambda: f"run.resume=false, but {in_use}" if any(others) else None)
        path = latest(self.directory / CHECKPOINTS, group=group)
        if path is not None:
            self.changed = changed_fields(self.restore(path).config, asdict(self.config))

    def restore(self, path: Path) -> SavedState:
        """Take everything from a checkpoint; ValueError as for `resume`."""

        def is_this_run(state: dict[str, Any]) -> None:
            saved = read_state(path, state)
            check_same_identity(path, saved.identity, self.identity())
            # Their moments are others. A version before had AdamW only.
            check_same_identity(
                path,
                {"optimizer": saved.config.get("optim", {}).get("name", "adamw")},
                {"optimizer": self.config.optim.name},
            )

        with self.engine.optimizer.whole_weights():
            tensors = self.tensors()
            saved = read_state(path, load(path, tensors, group=self.components.checkpoint_group, check=is_this_run))
        generator_state = tensors["rng.cpu"]
        assert isinstance(generator_state, Tensor)
        torch.set_rng_state(generator_state)
        self.state, self.spikes, self.began_from = saved.train_state, saved.spikes, saved.began_from
        self.saved_step = self.state.step
        return saved
