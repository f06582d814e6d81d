"""A small V3 fine-tuned on a teacher's solutions in several ways, and its answers to problems that it never saw.

A model begins with the weights of a base, which has seen problems without answers for a few steps, and goes through the
stage `sft` on the store of one arm (`stores.py`). Of a seed all arms begin with the same weights and take as many
steps of as many positions. Answers are greedy; the model itself writes `<think>` or `</think>` first.

A run that was stopped goes on from its checkpoint; what was measured of one is stored, and read again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from train.chat.answers import same_answer
from train.chat.messages import read_row
from train.chat.render import ChatEncoder
from train.chat.thinking import Solution, split_thinking
from train.config import compose
from train.data.best_fit import ConversationPacking
from train.data.store import strict_json
from train.data.whole_file import write_whole
from train.evaluate.language_model import LanguageModel
from train.huggingface.weights import load_model, open_weights, tokenizer_of
from train.run_directory import run_directory
from train.studies.ablation.runs import train_or_read
from train.studies.distillation import sums
from train.studies.distillation.stores import ARMS, BASE, VOCAB_SIZE, Distilled, folder_of, make_stores
from train.studies.distillation.sums import Sum
from train.studies.recorded import claim_folder

# Positions of a sample: two conversations with working, of 55 each; of these an answer has 43 ids.
LENGTH, NEW_TOKENS = 110, 64
MODEL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "q_lora_rank": "null",
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.045,  # V3's 0.006 x sqrt(7168 / 128)
}


@dataclass(frozen=True)
class DistillationSize:
    """How much is trained and measured; a step is one of `sequences` samples."""

    training: int = 3000
    test: int = 300
    samples: int = 4
    base_steps: int = 20
    steps: int = 600
    sequences: int = 16
    lr: float = 3e-3
    seeds: tuple[int, ...] = (0, 1, 2)


SMOKE = DistillationSize(training=60, test=6, base_steps=2, steps=2, sequences=2, seeds=(0,))


def study(folder: Path, size: DistillationSize, *, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Distil, train and measure every arm of every seed, or read what is stored.

    Returns:
        size, torch; stores: of each arm what it is trained on; arms: of each for each seed what `measure` returns, the
        share right of as many problems of the training (`seen`), and seconds; guesses: without a model, name -> share
        of right answers.
    Raises:
        ValueError: the folder holds a study of another size or model, or a run was asked to stop.
    """
    claim_folder(folder, {"size": asdict(size), "model": MODEL})
    training, test = sums.draw(size.training, size.test, seed=0)
    stores = {arm: _describe(each, size) for arm, each in make_stores(folder, training, samples=size.samples).items()}
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in size.seeds:
        for arm in ARMS:
            compute = partial(_train_and_measure, folder, size, (training[: size.test], test), arm, seed)
            found[arm].append(_stored(folder / "scores" / f"{folder_of(arm)}-{seed}.json", compute))
            log(f"seed {seed}, {arm}: {found[arm][-1]['right']['all']:.1%} right")
    guesses = {
        "nearest neighbour": sums.nearest_answers(training, test),
        "most frequent answer": [sums.most_frequent_answer(training)] * len(test),
    }
    rights = {name: sums.share_right(_equal(answers, test), test) for name, answers in guesses.items()}
    whole = {"size": asdict(size), "torch": torch.__version__, "stores": stores, "arms": found, "guesses": rights}
    return dict(json.loads(strict_json(whole)))


def _equal(answers: Sequence[int], test: Sequence[Sum]) -> list[bool]:
    return [answer == asked.total for answer, asked in zip(answers, test, strict=True)]


def _describe(arm: Distilled, size: DistillationSize) -> dict[str, Any]:
    """What an arm is trained on, and how often."""
    epochs = size.steps * size.sequences / ConversationPacking(arm.store, LENGTH).num_samples
    return {
        "conversations": arm.store.manifest.documents,
        "wrong": arm.wrong,
        "targets": arm.targets,
        "epochs": epochs,
        "report": dict(arm.report),
    }


def _stored(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file holds; computed and written first unless it is there."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_whole(path, strict_json(compute()))
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _train_and_measure(
    folder: Path, size: DistillationSize, problems: tuple[Sequence[Sum], Sequence[Sum]], arm: str, seed: int
) -> dict[str, Any]:
    """Of a model of its own; `problems`: some of the training, and those of the test."""
    fit(_base(folder, size, seed))
    begun = time.process_time()
    run = fit(_tuned(folder, size, arm, seed))
    trained = time.process_time()
    seen, unseen = (measure(run, part) for part in problems)
    seconds = {"training_core_s": trained - begun, "test_core_s": time.process_time() - trained}
    return unseen | {"seen": seen["right"]["all"]} | seconds


def _shared(folder: Path, size: DistillationSize, name: str, seed: int, steps: int) -> list[str]:
    """Overrides that the base and the stages after it share."""
    return [
        "experiment=tiny",
        "precision=fp32",
        *(f"model.{field}={value}" for field, value in MODEL.items()),
        f"data.store={folder}/stores/{name}/train",
        "data.heldout=null",
        f"data.sequence_length={LENGTH}",
        f"schedule.total_tokens={steps * size.sequences * LENGTH}",
        f"schedule.batch_start_sequences={size.sequences}",
        f"schedule.batch_full_sequences={size.sequences}",
        f"run.micro_batch_sequences={size.sequences}",
        f"run.directory={folder}/runs",
        f"run.name={name}-{seed}",
        f"run.seed={seed}",
        # One thread: the same figures on any machine of a kind.
        "run.threads=1",
        "run.device=cpu",
        "observe.wandb=off",
        "observe.console_every_steps=200",
        # Every arm takes every step.
        "spikes.window_steps=0",
    ]


def _base(folder: Path, size: DistillationSize, seed: int) -> list[str]:
    return [*_shared(folder, size, BASE, seed, size.base_steps), "data.fim_rate=0"]


def _tuned(folder: Path, size: DistillationSize, arm: str, seed: int) -> list[str]:
    """The stage `sft` but for its rate: as high as so small a model needs, down to a twentieth, after a warm-up."""
    return [
        *_shared(folder, size, folder_of(arm), seed, size.steps),
        "+stage=sft",
        f"run.init_from={folder}/runs/{BASE}-{seed}",
        f"schedule.lr_peak={size.lr}",
        f"schedule.lr_after_decay={size.lr / 20}",
        f"schedule.lr_final={size.lr / 20}",
        f"schedule.warmup_steps={size.steps // 16}",
    ]


def fit(overrides: Sequence[str]) -> Path:
    """A run of the trainer to its end, from where it stopped; its folder. ValueError where it did not reach it."""
    config = compose(list(overrides))
    if stopped := train_or_read(config)["stopped"]:
        raise ValueError(f"{config.run.name}: {stopped}")
    return run_directory(config.run)


def measure(run: Path, test: Sequence[Sum]) -> dict[str, Any]:
    """Ask a run for the answers to all problems.

    Returns:
        right: share of right answers, of all and by number of digits; working: share whose working is right in every
        column; malformed: share without an end, or whose marks of thinking do not pair; examples: what was written for
        the first problem of each number of digits.
    """
    source = open_weights(run)
    device = torch.device("cpu")
    model = LanguageModel(
        load_model(source, device=device),
        device,
        name=str(run),
        load_tokenizer=partial(tokenizer_of, source, None),
        trained_on=source.trained_on,
        # All in one batch.
        batch_tokens=len(test) * LENGTH,
    )
    encoder = ChatEncoder(model.tokenizer, first_token=source.trained_on.first_token)
    written = model.generate(list(prompts(encoder, test)), max_new_tokens=NEW_TOKENS, temperature=0.0, seed=0)
    end, texts = model.tokenizer.special_ids.eos, [model.text_of(ids) for ids in written]
    solutions = [_solution(text, has_end=end in ids) for text, ids in zip(texts, written, strict=True)]
    pairs = list(zip(solutions, test, strict=True))
    right = [not said.cut_off and same_answer(said.answer, str(asked.total)) for said, asked in pairs]
    # The last of equal keys stays: in reverse order the first.
    examples = {asked.num_digits: (asked.text, text) for asked, text in reversed([*zip(test, texts, strict=True)])}
    return {
        "right": sums.share_right(right, test),
        "working": sum(said.thoughts == sums.solve(asked)[0] for said, asked in pairs) / len(pairs),
        "malformed": sum(said.cut_off for said in solutions) / len(pairs),
        "examples": dict(examples[digits] for digits in sorted(examples)),
    }


def prompts(encoder: ChatEncoder, problems: Sequence[Sum]) -> Iterator[list[int]]:
    """Ids of each problem up to the mark of the assistant: those of a conversation before the first with a loss."""
    rows = [read_row({"prompt": problem.text, "completion": "0"}) for problem in problems]
    for encoded in encoder.encode(rows):
        yield encoded.ids[: int(encoded.loss_mask.argmax())].tolist()


def _solution(text: str, *, has_end: bool) -> Solution:
    """Thoughts and answer; cut off where it has no end, or where their marks do not pair."""
    try:
        thoughts, answer = split_thinking(text, cut_off=not has_end)
    except ValueError:
        return Solution("", cut_off=True)
    return Solution(answer, thoughts, cut_off=not has_end)
