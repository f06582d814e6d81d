"""The trainer's promises on a small run, in process: schedules followed, bad steps skipped, evaluation without trace.

Also what it refuses: stores that do not fit, a resumed run with another data order, a directory in use.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import signal
import statistics
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import launch.pretrain
import train.assemble
import train.trainer
import train.worker
from kernels.deferred import deferred, take
from tests.studies.plan.plan_documents import plan_by_hand
from tests.system.lives import copied_state, losses
from train.assemble import Components, build_alone, choose_device
from train.checkpoint import publish
from train.checkpoint.dcp import Saver, latest
from train.config import PretrainConfig, compose
from train.data.ingest import Recipe, prepare
from train.data.stream import iterate_windows
from train.losses import LossWeights, balance_sum, loss_sums
from train.observe.guards import Diverged, SavesFailed, TrainingStopped
from train.observe.sinks import read_events, read_run
from train.optim.balance import routers
from train.schedules import scheduled_values
from train.step import StepGradients, apply_update, compute_gradients
from train.studies.plan.candidate import run_of
from train.studies.plan.witness import Witness, compared
from train.trainer import Trainer


@pytest.fixture
def config(small_config: Callable[..., PretrainConfig], tmp_path: Path) -> PretrainConfig:
    return small_config(tmp_path, "schedule.total_tokens=640")


@pytest.fixture
def short(small_config: Callable[..., PretrainConfig], tmp_path: Path) -> PretrainConfig:
    """One step, not scored."""
    return small_config(tmp_path, "schedule.total_tokens=64", "data.heldout=null")


def trainer_of(config: PretrainConfig) -> Trainer:
    trainer = Trainer(config, build_alone(config))
    trainer.resume()
    return trainer


def updated(config: PretrainConfig, parts: Components, step: int, **changes: float) -> StepGradients:
    """One step and its update, with some scheduled values given by hand."""
    now = replace(scheduled_values(config.schedule, step=step, tokens_seen=0), **changes)
    gradients = compute_gradients(parts.engine, parts.stream.take(2 * step, 2), num_micro_batches=1, now=now)
    apply_update(parts.engine, gradients, now=now, update=step + 1)
    return gradients


def test_every_step_follows_the_schedules(config: PretrainConfig) -> None:
    config = replace(
        config,
        data=replace(config.data, heldout=None),
        schedule=replace(
            config.schedule,
            total_tokens=1600,
            batch_full_sequences=6,
            batch_ramp_tokens=1000,
            batch_multiple_sequences=2,
            warmup_steps=3,
            constant_until_tokens=600,
            decay_until_tokens=1200,
            final_from_tokens=1400,
            mtp_weight_until_tokens=800,
            bias_speed_until_tokens=900,
        ),
    )
    trainer_of(config).fit()
    records = read_run(Path(config.run.directory) / "run")
    tokens = 0
    for step, record in enumerate(records):
        now = scheduled_values(config.schedule, step=step, tokens_seen=tokens)
        assert record["optim/lr"] == now.lr
        assert record["schedule/batch_sequences"] == now.batch_sequences
        assert record["schedule/bias_speed"] == now.bias_speed
        assert record["schedule/mtp_weight"] == now.mtp_weight
        tokens += now.batch_sequences * config.data.sequence_length
        assert record["tokens_seen"] == tokens
    assert {r["schedule/batch_sequences"] for r in records} == {2, 4, 6}
    assert {r["schedule/mtp_weight"] for r in records} == {0.3, 0.1}
    assert records[-2]["tokens_seen"] < 1600 <= records[-1]["tokens_seen"]


def test_the_learning_rate_and_gamma_of_the_step_are_applied(config: PretrainConfig) -> None:
    parts = build_alone(config)
    master = parts.engine.optimizer.masters()["lm_head.weight"].tensor
    before = master.clone()
    gradients = updated(config, parts, 0, lr=1e-3, bias_speed=0.25)
    moved = (master - before).abs()
    # Adam's first update is lr * g / (|g| + eps) plus decay of 0.1 * |w| * lr: no element moves further.
    assert moved.max() <= 1e-3 * (1 + 0.1 * before.abs().max()) * 1.01
    assert moved.max() > 0.5e-3
    for layer_id, router in routers(parts.engine.models).items():
        counts = gradients.counts[layer_id]
        direction = torch.sign(counts.double().mean() - counts.double())
        assert torch.equal(router.e_score_correction_bias, 0.25 * direction.float())


def test_every_update_moves_the_average_of_the_weights(config: PretrainConfig) -> None:
    parts = build_alone(replace(config, optim=replace(config.optim, ema_decay=0.75)))
    ema = parts.engine.ema
    master = parts.engine.optimizer.masters()["lm_head.weight"].tensor
    expected = master.clone()
    for step in range(3):
        updated(config, parts, step, lr=1e-3)
        expected.lerp_(master, 0.25)
    assert torch.equal(ema.state_shards()["ema.lm_head.weight"].tensor, expected)
    assert not torch.equal(expected, master)
    ema.close()


def test_the_bias_balances_a_skewed_router_and_gamma_0_does_not(config: PretrainConfig) -> None:
    def violations(gamma: float, steps: int) -> list[float]:
        parts = build_alone(config)
        for router in routers(parts.engine.models).values():
            # Initial scores lie close to 0.5, so a head start of 0.5 makes every token choose expert 0.
            router.e_score_correction_bias[0] = 0.5
        seen = []
        for step in range(steps):
            counts = updated(config, parts, step, lr=0.0, bias_speed=gamma).counts[1].double()
            seen.append(float(counts.max() / counts.mean() - 1))
        return seen

    still, moving = violations(0.0, 6), violations(0.04, 16)
    # 8 experts, top 2: an expert that every token takes has 4 times the mean load, MaxVio 3.
    assert still[0] == moving[0] == 3.0
    assert min(still) > 2.5
    # Measured: 0.5 to 1.1, 0.73 in the mean.
    assert sum(moving[-8:]) / 8 < 1.0


def test_a_bad_step_is_skipped_and_counted(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {4, 5, 8}
    trainer = trainer_of(config)
    updates: list[int] = []

    def compute(*args: object, **kwargs: object) -> StepGradients:
        gradients = compute_gradients(*args, **kwargs)  # type: ignore[arg-type]
        is_bad = trainer.state.step + 1 in bad
        return replace(gradients, finite=gradients.finite & (not is_bad))

    def update(*args: object, **kwargs: int) -> None:
        updates.append(kwargs["update"])
        apply_update(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(train.trainer, "compute_gradients", compute)
    monkeypatch.setattr(train.trainer, "apply_update", update)
    state = trainer.fit()
    assert (state.step, state.skipped_steps, state.consecutive_skips) == (10, 3, 0)
    # Adam's bias correction counts updates, not steps.
    assert updates == list(range(1, 8))
    assert [r["guard/skipped_steps"] for r in read_run(trainer.directory)] == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3]
    assert [e["step"] for e in read_events(trainer.directory) if e["event"] == "skip"] == [4, 5, 8]


def test_nan_stops_after_k_steps_with_a_checkpoint_and_untouched_weights(config: PretrainConfig) -> None:
    config = replace(config, run=replace(config.run, max_consecutive_nonfinite=3))
    trainer = trainer_of(config)
    with torch.no_grad():
        trainer.engine.models[0].lm_head.weight[0, 0] = math.nan
    before = copied_state(trainer)
    with pytest.raises(TrainingStopped, match="not finite 3 steps in a row"):
        trainer.fit()
    after = copied_state(trainer)
    assert all(torch.equal(before[n].nan_to_num(7.0), after[n].nan_to_num(7.0)) for n in before if n != "rng.cpu")
    checkpoints = trainer.directory / "checkpoints"
    assert latest(checkpoints) == checkpoints / "step_00000003"
    # The count travels with the checkpoint: the resumed run stops after one more bad step, not after three.
    with pytest.raises(TrainingStopped, match=r"step 4: .* not finite 4 steps in a row"):
        trainer_of(config).fit()


def test_evaluation_leaves_no_trace_and_scores_what_fp64_scores(config: PretrainConfig) -> None:
    plain = trainer_of(config)
    plain.fit()
    looked = trainer_of(replace(config, run=replace(config.run, name="looked", eval_every_steps=4)))
    looked.fit()
    assert losses(plain.directory) == losses(looked.directory)
    scored = [record["step"] for record in read_run(looked.directory) if "eval/bits_per_byte" in record]
    assert scored == [4, 8, 10]
    heldout, model = plain.components.heldout, plain.engine.models[0]
    nats = 0.0
    with torch.no_grad():
        for batch in iterate_windows(heldout, sequence_length=32, batch_sequences=1):
            logits = model.logits(model(batch.input_ids).hidden).double()
            nats += float(F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum"))
    bits = nats / math.log(2) / heldout.manifest.text_bytes
    # FP32 log-softmax over 1024 logits against FP64: 1e-6 relative.
    assert read_run(plain.directory)[-1]["eval/bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_the_random_state_is_resumed(short: PretrainConfig) -> None:
    trainer = trainer_of(short)
    torch.rand(5)
    trainer.fit()
    expected = torch.rand(3)
    torch.manual_seed(99)
    trainer_of(short)
    assert torch.equal(torch.rand(3), expected)


def test_sigterm_during_the_last_save_is_survived(short: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Saver.save_async

    def terminated(self: Saver, *args: object, **named: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        original(self, *args, **named)  # type: ignore[arg-type]

    # One save only, the last.
    trainer = trainer_of(short)
    monkeypatch.setattr(Saver, "save_async", terminated)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM reached the process while it saved"))
    try:
        assert trainer.fit().step == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    checkpoints = trainer.directory / "checkpoints"
    assert latest(checkpoints) == checkpoints / "step_00000001"


def test_events_are_logged_when_they_happen(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save of step 5 is held back until step 7 is over: no step waits for it, and the next one logs it."""
    held, publish_manifest, alerts = threading.Event(), publish.write_manifest, Path(config.run.directory) / "alerts"
    monkeypatch.setattr(publish, "write_manifest", lambda *a: held.wait() and publish_manifest(*a))
    observe = replace(config.observe, alert_command=f"tee -a {alerts}", stale_checkpoint_s=2500.0)
    trainer = trainer_of(replace(config, observe=observe))
    # A step takes 1000 s, and the third is slow.
    monkeypatch.setattr(trainer.checkpoint_age, "_clock_s", lambda: 1000.0 * trainer.state.step)
    monkeypatch.setattr(trainer.speed_guard, "note", lambda _: trainer.state.step == 3)
    take_step = trainer.take_step

    def stepped(*arguments: object) -> None:
        if trainer.state.step == 7:
            held.set()
            trainer.saver._in_flight.result()  # type: ignore[union-attr]
        take_step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "take_step", stepped)
    trainer.fit()
    lines = [json.loads(line) for line in (trainer.directory / "metrics.jsonl").read_text().splitlines()]
    order = [(line.get("event", "step"), line["step"]) for line in lines]
    before = {("stale_checkpoint", 3): 3, ("low_speed", 3): 3, ("checkpoint", 5): 8, ("checkpoint", 10): 10}
    for event, step in before.items():
        assert [each for each in order[: order.index(event)] if each[0] == "step"][-1] == ("step", step)
    assert order.count(("checkpoint", 5)) == 1
    # At each multiple of the limit until the save of step 5 is published.
    assert [line["age_s"] for line in lines if line.get("event") == "stale_checkpoint"] == [3000.0, 5000.0]
    kinds = [json.loads(line)["kind"] for line in alerts.read_text().splitlines()]
    assert sorted(kinds) == ["low_speed", "stale_checkpoint"]


def test_start_and_end_are_said(config: PretrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(config)
    trainer.fit()
    said = capsys.readouterr().out.splitlines()
    numel = {name: p.numel() for name, p in trainer.engine.models[0].named_parameters()}
    total = sum(count for name, count in numel.items() if not name.startswith("mtp."))
    assert f"model: {total / 1e3:.1f}k parameters, " in said[1]
    assert said[0].startswith("run  bf16 on cpu (threads: 1), 1 process, torch ")
    assert said[2] == "run  budget: 640 tokens in 10 steps, sequences of 32; 10 steps to go"
    assert said[3].startswith(f"run  folder: {trainer.directory}, a checkpoint every 5 steps; ")
    last = read_run(trainer.directory)[-1]
    end = said.index("run  ended after step 10: token budget spent")
    score = f"held-out {last['eval/bits_per_byte']:.4f} bits per byte at step 10"
    assert said[end + 1].startswith(f"run  loss {last['loss/main']:.3f}, {score}, ")
    commands = [line.removeprefix("run  next: ") for line in said[end + 2 :]]
    assert [command.split()[1:3] for command in commands] == [
        [f"launch/{name}.py", str(trainer.directory)] for name in ("score", "generate", "dashboard")
    ]


def test_a_run_that_is_not_deterministic_says_so(
    config: PretrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that keeps documents apart says how."""
    run, data = replace(config.run, deterministic=False), replace(config.data, mask_documents=True)
    config = replace(config, run=run, data=data)
    trainer = trainer_of(config)
    monkeypatch.setattr(trainer, "budget_is_spent", lambda: trainer.state.step == 2)
    trainer.fit()
    assert "run  a resume goes on not bit for bit, since run.deterministic is false" in capsys.readouterr().out
    again = trainer_of(config)
    again.resume()
    again.fit()
    assert "run  resumed at step 2; not bit for bit, since run.deterministic is false" in capsys.readouterr().out
    (resumed,) = (event for event in read_events(again.directory) if event["event"] == "resume")
    assert resumed["deterministic"] is False
    card = json.loads((again.directory / "run_card.json").read_text())
    attention = "batched GEMMs; each document alone where a sample has several"
    assert (card["deterministic"], card["attention"]) == (False, attention)


def test_a_run_that_took_no_step_says_no_next_command(
    config: PretrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(config)
    monkeypatch.setattr(trainer, "holds_on_a_rank", lambda _: True)
    trainer.fit()
    assert read_events(trainer.directory)[-1]["reason"] == "asked to stop; the same command resumes"
    assert "next:" not in capsys.readouterr().out


@pytest.mark.parametrize("error", [Diverged("it left"), SavesFailed("full"), RuntimeError("a defect")])
def test_after_a_failure_no_next_command_is_said(
    error: Exception, short: PretrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(short)
    monkeypatch.setattr(trainer, "save_last", lambda _: (_ for _ in ()).throw(error))
    with pytest.raises(type(error), match=str(error)):
        trainer.fit()
    assert "next:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("another seed: was 1234, now 7", "run.seed=7"),
        ("another model: num_attention_heads was 2, now 4", "model.num_attention_heads=4"),
        ("another precision: name was bf16, now fp8", "precision=fp8"),
        ("another data: fim_rate was 0.1, now 0.5", "data.fim_rate=0.5"),
        ("another data: sequence_length was 32, now 64", "data.sequence_length=64"),
    ],
)
def test_a_run_is_not_resumed_with_another(
    field: str, change: str, trained_run: Path, small_run: Callable[..., list[str]]
) -> None:
    other = compose(small_run(change, f"run.directory={trained_run.parent}", f"run.name={trained_run.name}"))
    with pytest.raises(ValueError, match=field):
        trainer_of(other)


def test_a_run_of_a_version_with_another_eps_in_the_latents_norms_is_not_resumed(
    short: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_eps = replace(short, model=replace(short.model, rms_norm_eps=1e-5))
    identity = Trainer.identity
    with monkeypatch.context() as older:
        older.setattr(Trainer, "identity", lambda self: {k: v for k, v in identity(self).items() if "eps" not in k})
        trainer_of(other_eps).fit()
    with pytest.raises(ValueError, match=r"another latent_norm_eps: was None, now 1e-06"):
        trainer_of(other_eps)


@pytest.fixture(scope="module")
def prolonged(
    small_config: Callable[..., PretrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """Ten steps of a run in whose directory a plan lies, then one more in a new process; what both said."""
    place, said = tmp_path_factory.mktemp("prolonged"), []
    first = small_config(place, "schedule.total_tokens=640")
    for total_tokens in (640, 704):
        config = replace(first, schedule=replace(first.schedule, total_tokens=total_tokens))
        if not (place / "run").exists():
            (place / "run").mkdir()
            document = plan_by_hand(run_of(config), compared(config))
            (place / "run/plan.json").write_text(json.dumps(document))
            # It is no run yet.
            config = replace(config, run=replace(config.run, resume=False))
        trainer = Trainer(config, build_alone(config), Witness())
        trainer.resume()
        with contextlib.redirect_stdout(io.StringIO()) as console:
            trainer.fit()
        said += console.getvalue().splitlines()
    return place / "run", said


def test_a_changed_schedule_is_noted_when_resuming(prolonged: tuple[Path, list[str]]) -> None:
    (resumed,) = [e for e in read_events(prolonged[0]) if e["event"] == "resume"]
    assert resumed["changed"] == {"run.resume": [False, True], "schedule.total_tokens": [640, 704]}


def test_a_run_is_judged_by_the_plan_in_its_directory_once_and_its_card_keeps_it(
    prolonged: tuple[Path, list[str]],
) -> None:
    """Beside what the log says of steps 4 to 10."""
    run, said = prolonged
    judged = json.loads((run / "run_card.json").read_text())["predicted_vs_measured"]
    records = {record["step"]: record for record in read_run(run)}
    assert len(records) == 11
    rows = judged["rows"]
    step_s = statistics.median(64 / records[step]["speed/tokens_per_s"] for step in range(4, 11))
    assert (judged["steps"], judged["device"], judged["precision"]) == ([4, 10], "cpu", "bf16")
    # The same doubles, divided in the same order.
    assert rows["step_s"] == {"predicted": 2.0, "measured": step_s, "error": 2.0 / step_s - 1}
    phases_s = [rows[name]["measured"] for name in ("data_s", "gradients_s", "update_s")]
    assert all(phases_s)
    # Medians of parts against the median of the whole: every part is inside the step, and nothing long is outside.
    fastest, slowest = (f(64 / records[step]["speed/tokens_per_s"] for step in range(4, 11)) for f in (min, max))
    assert 0.5 * fastest < sum(phases_s) < 1.5 * slowest
    assert rows["work_s"]["measured"] + rows["waiting_s"]["measured"] >= rows["gradients_s"]["measured"] - 1e-9
    heads = [line for line in said if "predicted vs measured" in line]
    assert heads == ["run  predicted vs measured: plan by hand of 2026-11-30, medians of steps 4 to 10, rank 0"]


def test_pretrain_brings_a_witness_and_the_worker_hands_it_to_the_trainer(
    config: PretrainConfig, small_run: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def trainer_of(config: PretrainConfig, components: None, after_step: object) -> SimpleNamespace:
        given.append(after_step)
        return SimpleNamespace(resume=lambda: None, fit=lambda: None)

    monkeypatch.setattr(train.worker, "build", lambda *_: None)
    monkeypatch.setattr(train.worker, "Trainer", trainer_of)
    assert launch.pretrain.main(small_run(f"run.directory={config.run.directory}", "run.name=run")) == 0
    assert [type(each) for each in given] == [Witness]


def test_a_used_directory_is_refused_when_resuming_is_off(config: PretrainConfig, trained_run: Path) -> None:
    used = replace(config.run, directory=str(trained_run.parent), name=trained_run.name, resume=False)
    with pytest.raises(ValueError, match="already holds a run"):
        trainer_of(replace(config, run=used))


def test_stores_that_do_not_fit_are_refused_before_the_model_is_made(
    config: PretrainConfig, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.assemble, "build_engine", lambda *_, **__: pytest.fail("the model was built"))
    source = tmp_path / "other.jsonl"
    source.write_text("\n".join(json.dumps({"text": f"another text, number {i}"}) for i in range(40)))
    foreign = prepare(Recipe(source=str(source), vocab_size=280), tmp_path / "foreign")
    cases = {
        "vocab": replace(config, model=replace(config.model, vocab_size=200)),
        "tokeni": replace(config, data=replace(config.data, heldout=str(foreign.train.path))),
        "not a tokenised store": replace(config, data=replace(config.data, store=str(tmp_path / "nowhere"))),
        "fewer than one sample": replace(
            config,
            model=replace(config.model, max_position_embeddings=100_000),
            data=replace(config.data, sequence_length=100_000),
            schedule=replace(config.schedule, total_tokens=10**6),
        ),
    }
    for message, bad in cases.items():
        with pytest.raises(ValueError, match=message):
            build_alone(bad)


def test_device_auto_takes_a_gpu_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="shows no CUDA GPU"):
        choose_device("cuda")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_every_weight_gradient_of_the_model_waits_in_the_queue(precision: str, config: PretrainConfig) -> None:
    model = build_alone(replace(config, precision=compose([f"precision={precision}"]).precision)).engine.models[0]
    tokens = torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(0))
    step = LossWeights(mtp_weight=0.3, balance_alpha=1e-4, num_targets=torch.tensor(64), num_sequences=2)
    # The head's is made in forward: docs/decisions/0012-chunked-loss.md.
    matrices = {name: p for name, p in model.named_parameters() if p.ndim > 1 and name != "lm_head.weight"}

    def backward() -> None:
        output = model(tokens[:, :-1])
        (loss_sums(model, output, tokens[:, 1:], step).total + balance_sum(output, step)).backward()

    backward()
    at_once = {name: p.main_grad.clone() for name, p in matrices.items()}
    for parameter in matrices.values():
        parameter.main_grad.zero_()
    with deferred():
        backward()
        assert not any(p.main_grad.any() for p in matrices.values())
        take()()
    different = [name for name, p in matrices.items() if not torch.equal(p.main_grad, at_once[name])]
    assert not different
