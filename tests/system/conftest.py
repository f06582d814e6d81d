"""A small tokenised store and the command line of a small run, shared by the system tests."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest

from train.assemble import build_alone
from train.config import PretrainConfig, compose
from train.data.ingest import Recipe, prepare
from train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
PROSE = "the king said unto his people behold this day is a day of the lord and he went out from thence"


# Than `tiny`, by ten times: these tests are about the run, not about its sums.
SMALLER = (
    "model.hidden_size=128",
    "model.intermediate_size=128",
    "model.moe_intermediate_size=128",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.q_lora_rank=128",
    "model.kv_lora_rank=128",
)


def small_store(folder: Path) -> Path:
    """Stores `train` and `heldout` of 60 short documents with some order in them."""
    source, chooser, words = folder / "text.jsonl", random.Random(0), PROSE.split()
    with source.open("w") as lines:
        for _ in range(60):
            text = " ".join(chooser.choice(words[i % 5 :]) for i in range(120))
            lines.write(json.dumps({"text": text}) + "\n")
    # Three documents are scored: each evaluation of these short runs costs as much as a few of their steps.
    prepare(Recipe(source=str(source), vocab_size=300, heldout=0.05), folder / "store")
    return folder / "store"


@pytest.fixture
def as_root() -> None:
    """What file systems and networks of a test's own need; under `.ci/run` it is there, or the test fails."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        say = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        say("needs root and iproute2 on Linux, for a file system or network of its own; `.ci/run` fails without them")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_store(tmp_path_factory.mktemp("text"))


def small_overrides(store: Path, *changes: str) -> list[str]:
    """A run of 24 steps of 2 x 32 tokens, one micro-batch each, one thread, a checkpoint every 5 steps.

    Changes replace what was said; two data ranks take `run.micro_batch_sequences=1`.
    """
    overrides = [
        "experiment=tiny",
        *SMALLER,
        f"data.store={store / 'train'}",
        f"data.heldout={store / 'heldout'}",
        "data.sequence_length=32",
        "schedule.total_tokens=1536",
        "schedule.batch_start_sequences=2",
        "schedule.batch_full_sequences=2",
        "run.micro_batch_sequences=2",
        "run.threads=1",
        "run.device=cpu",
        "checkpoint.every_steps=5",
        "observe.wandb=off",
    ]
    return list({text.split("=")[0]: text for text in (*overrides, *changes)}.values())


@pytest.fixture(scope="session")
def small_run(store: Path) -> Callable[..., list[str]]:
    """`small_overrides` on the small store: a function (*changes) -> overrides."""
    return partial(small_overrides, store)


@cache
def composed(*overrides: str) -> PretrainConfig:
    """`compose`, once in a process: reading the same files again takes as long as several steps of a small run."""
    return compose(list(overrides))


@pytest.fixture(scope="session")
def small_config(store: Path) -> Callable[..., PretrainConfig]:
    """`small_overrides` composed: a function (directory, *changes) -> configuration of the run `run` in it."""

    def made(directory: Path, *changes: str) -> PretrainConfig:
        config = composed(*small_overrides(store, "run.name=run", *changes))
        return replace(config, run=replace(config.run, directory=str(directory)))

    return made


@pytest.fixture(scope="session")
def trained_run(small_run: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of the small model in BF16, scored at the end."""
    folder = tmp_path_factory.mktemp("runs")
    config = compose(small_run("schedule.total_tokens=192", f"run.directory={folder}", "run.name=run"))
    Trainer(config, build_alone(config)).fit()
    return folder / "run"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a command can see, so that its runs and stores do not land in the repository."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "data", "kernels", "launch", "parallel", "train"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    return place
