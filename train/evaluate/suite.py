"""One evaluation of one model: stores, multiple choice, exact match, and tasks of lm-eval, in one report.

Whatever a user can get wrong (files, hashes, names) is read and checked before the first forward pass; scores follow.
A store is scored with the sample length and document masking of the run, so that a run's last score in its log comes
out again (up to the order of sums in a batch of another size).

Not here: where weights come from (`train/checkpoint/reader.py`), the command line (`launch/score.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from train.data.store import TokenStore
from train.data.tokenizer import TextTokenizer, load_tokenizer
from train.evaluate.benchmarks import Task, choose_tasks
from train.evaluate.choice import score_choices
from train.evaluate.exact import Attempts, Generate, score_exact
from train.evaluate.generate import Request, generate
from train.evaluate.likelihood import Scorer, logits_at, loss_of_batch
from train.evaluate.lm_eval_adapter import HarnessParts, base_class, run_tasks
from train.evaluate.questions import read_choices, read_problems
from train.evaluate.sampling import Sampling
from train.evaluate.score import score_store, total_score
from train.model.decode import Decoder
from train.model.transformer import Transformer

# Sample length for models that say nothing of their own, tokens: V3's in pre-training (arXiv:2412.19437 §4.2).
DEFAULT_TOKENS = 4096
# Name of all stores together.
TOTAL = "total"


@dataclass(frozen=True)
class Subject:
    """The model under test.

    Args:
        model: all of it, in evaluation mode.
        device: where it is.
        name: for messages.
        tokenizer_path: its tokenizer.json; None where it is unknown.
        tokenizer_sha256: of that file as training knew it; None where it is unknown.
        start: name of the special token that begins a sequence: "eos" for runs of ours, "bos" for released models.
        max_tokens: longest input; also the sample length of stores.
        batch_tokens: tokens of one forward pass.
        mask_documents: whether samples of a store limit attention to a document.
    """

    model: Transformer
    device: torch.device
    name: str
    tokenizer_path: Path | None
    tokenizer_sha256: str | None = None
    start: str = "eos"
    max_tokens: int = DEFAULT_TOKENS
    batch_tokens: int = 4096
    mask_documents: bool = False

    def __post_init__(self) -> None:
        positions = self.model.config.max_position_embeddings
        if not 1 <= self.max_tokens <= positions:
            raise ValueError(f"--max-length {self.max_tokens}: the model has positions for 1 to {positions} tokens")
        if self.batch_tokens < 1:
            raise ValueError(f"--batch-tokens {self.batch_tokens} must be 1 or more")

    def tokenizer(self) -> TextTokenizer:
        """The tokeniser, compared with the one that training knew.

        Raises:
            ValueError: there is none, it is another one, or it has ids that the model lacks.
        """
        if self.tokenizer_path is None:
            raise ValueError(f"{self.name} comes without a tokeniser; name its tokenizer.json with --tokenizer")
        tokenizer = load_tokenizer(self.tokenizer_path)
        if self.tokenizer_sha256 not in (None, tokenizer.sha256):
            raise ValueError(
                f"{self.tokenizer_path} has sha256 {tokenizer.sha256[:12]}, but {self.name} was trained with "
                f"tokeniser {self.tokenizer_sha256[:12] if self.tokenizer_sha256 else None}; give that one"
            )
        if tokenizer.vocab_size > self.model.config.vocab_size:
            raise ValueError(
                f"{self.tokenizer_path} has {tokenizer.vocab_size} ids, more than the model's vocab_size "
                f"{self.model.config.vocab_size}; it is another model's tokeniser"
            )
        return tokenizer

    def scorer(self) -> Scorer:
        """The model as something that scores continuations."""
        vocab_size = self.model.config.vocab_size
        return Scorer(logits_at(self.model, self.device), vocab_size, self.max_tokens, self.batch_tokens)


@dataclass(frozen=True)
class Suite:
    """What to measure.

    Args:
        stores: domain -> folder.
        choice: files of multiple-choice questions.
        exact: files of problems with a final answer.
        dev: file that examples are taken from; of the same format as the questions.
        shots: examples before each question.
        attempts: how solutions are written.
        seed: of the order of GPQA's options.
        tasks: names for lm-eval, or "".
        limit: documents of each lm-eval task; None for all.
        run_code: whether lm-eval may run what the model wrote.
    """

    stores: Mapping[str, Path] = field(default_factory=dict)
    choice: Sequence[Path] = ()
    exact: Sequence[Path] = ()
    dev: Path | None = None
    shots: int = 0
    attempts: Attempts = field(default_factory=Attempts)
    seed: int = 0
    tasks: str = ""
    limit: int | None = None
    run_code: bool = False

    def __post_init__(self) -> None:
        if not (self.stores or self.choice or self.exact or self.tasks):
            raise ValueError("nothing to score: give --store, --choice, --exact or --tasks")
        if self.shots < 0 or (self.shots and self.dev is None):
            raise ValueError(f"--shots {self.shots} asks for examples: name their file with --dev, or leave it 0")


def named_stores(arguments: Sequence[str]) -> dict[str, Path]:
    """`NAME=PATH` or `PATH`, which is its own name -> stores by name.

    Raises:
        ValueError: a name twice, or one that the report needs itself.
    """
    stores: dict[str, Path] = {}
    for argument in arguments:
        name, _, path = argument.rpartition("=")
        name = name or path
        if name in stores or name == TOTAL:
            raise ValueError(f"--store {argument}: the name {name!r} is taken; choose another one with NAME=PATH")
        stores[name] = Path(path)
    return stores


def check_free(out: Path | None) -> None:
    """Refuse a result file that could not be written, or that holds other results.

    Raises:
        ValueError: it exists, or its folder does not.
    """
    if out is not None and (out.exists() or not out.parent.is_dir()):
        state = "exists already" if out.exists() else "lies in a folder that does not exist"
        raise ValueError(f"--out {out} {state}; name another file")


def open_store(subject: Subject, path: Path) -> TokenStore:
    """A store that fits the model: same tokeniser, no id beyond its vocabulary.

    Raises:
        ValueError: it does not fit, or the model's tokeniser is unknown.
    """
    store = TokenStore.open(path)
    store.check(vocab_size=subject.model.config.vocab_size)
    known = subject.tokenizer_sha256 or subject.tokenizer().sha256
    if store.manifest.tokenizer_sha256 != known:
        raise ValueError(
            f"--store {path} was made with tokeniser {store.manifest.tokenizer_sha256[:12]}, {subject.name} trained "
            f"with {known[:12]}; prepare the store with the model's: launch/prepare.py --tokenizer FILE"
        )
    return store


def evaluate(subject: Subject, suite: Suite) -> dict[str, Any]:
    """Measure what the suite asks for.

    Returns:
        {"stores": {domain: figures, "total": figures}, "choice": {file: figures}, "exact": {file: figures},
        "tasks": {task: figures}, "left_out": sentences}, each only where asked for.
    Raises:
        ValueError: anything a user can repair, in one sentence, before the first forward pass.
    """
    stores = {name: open_store(subject, path) for name, path in suite.stores.items()}
    choices = {str(path): read_choices(path, seed=suite.seed) for path in suite.choice}
    problems = {str(path): read_problems(path) for path in suite.exact}
    choice_shots = read_choices(suite.dev, seed=suite.seed) if suite.dev and choices else []
    problem_shots = read_problems(suite.dev) if suite.dev and problems else []
    tasks, left_out = choose_tasks(suite.tasks, run_code=suite.run_code) if suite.tasks else ([], [])
    if tasks:
        base_class()
    results: dict[str, Any] = {"stores": _score_stores(subject, stores)} if stores else {}
    if choices or problems or tasks:
        tokenizer = subject.tokenizer()
        start = getattr(tokenizer.special_ids, subject.start)
        for file, questions in choices.items():
            results.setdefault("choice", {})[file] = score_choices(
                subject.scorer(), tokenizer, questions, start=start, examples=choice_shots, shots=suite.shots
            )
        generate_ids = generator(subject, eos=tokenizer.special_ids.eos)
        for file, asked in problems.items():
            results.setdefault("exact", {})[file] = score_exact(
                generate_ids,
                tokenizer,
                asked,
                start=start,
                attempts=suite.attempts,
                examples=problem_shots,
                shots=suite.shots,
            )
        parts = HarnessParts(subject.scorer(), tokenizer, start, generate_ids, subject.name)
        results |= _run_tasks(parts, tasks, left_out, suite)
    return results


def _score_stores(subject: Subject, stores: Mapping[str, TokenStore]) -> dict[str, dict[str, float]]:
    loss = loss_of_batch(subject.model, subject.device)
    scores = {
        name: score_store(
            loss,
            store,
            sequence_length=subject.max_tokens,
            batch_sequences=max(1, subject.batch_tokens // subject.max_tokens),
            mask_documents=subject.mask_documents,
        )
        for name, store in stores.items()
    }
    return {name: score.to_json() for name, score in {**scores, TOTAL: total_score(scores.values())}.items()}


def _run_tasks(parts: HarnessParts, tasks: list[Task], left_out: list[str], suite: Suite) -> dict[str, Any]:
    if not tasks:
        return {}
    found = run_tasks(parts, tasks, limit=suite.limit, run_code=suite.run_code)
    return {"tasks": found, "left_out": left_out}


def generator(subject: Subject, *, eos: int) -> Generate:
    """The model as a `Generate`: as many prompts together as fit `batch_tokens`, without drafting."""

    def run(prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int) -> list[list[int]]:
        decoder = Decoder(subject.model)
        longest = max(map(len, prompts), default=1)
        together = max(1, subject.batch_tokens // (longest + max_new_tokens))
        requests = [
            Request(tuple(prompt), max_new_tokens, seed=(seed << 32) + index) for index, prompt in enumerate(prompts)
        ]
        written: list[list[int]] = []
        for first in range(0, len(requests), together):
            done = generate(
                decoder,
                requests[first : first + together],
                sampling=Sampling(temperature=temperature),
                eos=eos,
                drafting=False,
            )
            written += [list(completion.ids) for completion in done]
        return written

    return run


def summary_lines(results: Mapping[str, Any]) -> Iterator[str]:
    """What to read on a terminal; everything else is in the JSON."""
    for name, figures in results.get("stores", {}).items():
        yield (
            f"{name}: {figures['bits_per_byte']:.4f} bits per byte, perplexity {figures['perplexity']:.3f} per token, "
            f"{figures['tokens']} tokens, {figures['text_bytes']} bytes"
        )
    for file, ways in results.get("choice", {}).items():
        for way, figures in ways.items():
            for name, value in figures.items():
                if name.startswith("acc"):
                    share = f"{value['value']:.2%} +- {value['standard_error']:.2%}"
                    yield f"{file} {way} {name}: {share} of {value['questions']} questions"
            if figures["cut_tokens"]:
                yield f"{file} {way}: prompts were cut, by up to {figures['cut_tokens']} tokens, to fit --max-length"
    for file, figures in results.get("exact", {}).items():
        value = figures["pass@1"]
        yield (
            f"{file} pass@1: {value['value']:.2%} +- {value['standard_error']:.2%} of {value['problems']} problems, "
            f"{figures['samples']} samples each; {figures['without_box']:.0%} without \\boxed, "
            f"{figures['unfinished']:.0%} unfinished"
        )
    for name, figures in results.get("tasks", {}).items():
        yield f"{name}: {figures['results']} (DeepSeek-V3-Base: {figures['deepseek_v3_base']})"
    for sentence in results.get("left_out", ()):
        yield f"left out: {sentence}"
