"""Every reader of files, as its command calls it, with the files that the product itself writes for it.

    readers(root) -> {name: Reader}     trains a tiny run, exports it, and writes questions, prompts and configurations

`Reader.read` takes a folder and returns the answer, as something that can be compared. The corpus has the same bytes on
every build, so that a seed and a number give the same damage again.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

import train.config
from tests.tiny_model import TINY
from train.assemble import build_alone
from train.checkpoint import publish
from train.config import PretrainConfig, compose
from train.data import store
from train.data.index import INDEX_NAME
from train.data.ingest import Recipe, prepare
from train.data.readers import read_texts
from train.data.store import TokenStore
from train.data.tokenizer import load_tokenizer
from train.evaluate.multiple_choice import question_prompt
from train.evaluate.suite import Suite, read_files
from train.generate.text import read_prompts
from train.huggingface.export import ExportOptions, export
from train.huggingface.reader import HfReader
from train.huggingface.verify import verify_export
from train.huggingface.weights import open_weights, tokenizer_of
from train.observe.metrics import METRICS
from train.observe.sinks import SCORE, JsonlSink, Sinks, read_events, read_run
from train.run_directory import locked
from train.spikes import SpikeState
from train.studies.dashboard.page import render
from train.trainer import Trainer

STEP = "checkpoints/step_00000002"


@dataclass(frozen=True)
class Reader:
    """A reader and its files; `share` is how many of about 100 inputs it gets."""

    folder: Path
    read: Callable[[Path], Any]
    share: int
    # Exceptions that its command turns into one sentence.
    exits: tuple[type[Exception], ...] = (ValueError,)
    # Whether an accepted file must give the undamaged answer: hashes promise so.
    equal: bool = False
    # Whether the hashes are made to fit the damage, so that what stands behind them is read.
    forged: bool = False
    links: bool = False
    files: str = "**/*"
    # JSON keys that name a file of the user's, wherever it is.
    free: tuple[str, ...] = ()
    # What else may stand in a sentence for the file, its folder, or the field that was damaged.
    named: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Files to damage."""
        found = (path for path in sorted(self.folder.glob(self.files)) if path.is_file())
        return [str(path.relative_to(self.folder)) for path in found]


def forge(folder: Path, name: str) -> None:
    """Let a checkpoint's or a store's hashes fit a changed file; a manifest that is no manifest stays as it is."""
    inside, changed = (folder / name).parent, Path(name).name
    try:
        manifest = json.loads((inside / publish.MANIFEST).read_bytes())
        del manifest["sha256"]
        entry = publish.entry_of(inside / changed)
        if "index" not in manifest:
            manifest["files"] |= {changed: entry} if changed in manifest["files"] else {}
            sealed = manifest | {"sha256": publish._sha256_of_body(manifest)}
        else:
            record = {"num_bytes": entry["bytes"], "sha256": entry["sha256"]}
            manifest["files"] |= {changed: record} if changed in manifest["files"] else {}
            if changed.endswith(store.DATA_SUFFIX):
                # A corpus of one block.
                index = (inside / INDEX_NAME).read_bytes()[: -len(bytes.fromhex(entry["sha256"]))]
                (inside / INDEX_NAME).write_bytes(index + bytes.fromhex(entry["sha256"]))
            if changed == INDEX_NAME or changed.endswith(store.DATA_SUFFIX):
                index_hash = publish.entry_of(inside / INDEX_NAME)
                manifest["index"] = {"num_bytes": index_hash["bytes"], "sha256": index_hash["sha256"]}
            sealed = manifest | {"sha256": store._sha256_of(manifest)}
        (inside / publish.MANIFEST).write_text(json.dumps(sealed))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return


def digest(tensors: dict[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bits."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hashed.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def _texts(root: Path) -> None:
    """Text to train on, questions of every format, prompts."""
    chooser, words = random.Random(0), ("the king", "said unto", "his people", "behold", "this day", "he went out")
    text = [" ".join(chooser.choice(words) for _ in range(30)) for _ in range(20)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text))
    choice = [
        {"question": "Who?", "options": ["a", "b é"], "answer": "B", "answer_index": 1, "category": "one"},
        {"question": "What is it?", "choices": ["x", "y", "z"], "answer": 2, "subject": "one"},
        {"Question": "Why", "Correct Answer": "1", "Incorrect Answer 1": "2", "Incorrect Answer 2": "3"},
    ]
    exact = [
        {"problem": "1+1", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1", "type": "Algebra"},
        {"question": "2+2", "answer": 4},
        {"problem": "3+3", "answer": "006"},
    ]
    (root / "texts").mkdir()
    for kind, content in {
        "jsonl": "".join(json.dumps({"id": 1, "text": line}) + "\n" for line in text),
        "json": json.dumps([{"text": line} for line in text]),
        "csv": "id,text\n" + "".join(f'1,"{line}"\n' for line in text),
        "txt": "\n\n".join(text),
    }.items():
        (root / f"texts/a.{kind}").write_text(content)
    (root / "texts/a.txt.gz").write_bytes(gzip.compress("\n\n".join(text).encode(), mtime=0))
    pq.write_table(pa.table({"text": text}), root / "texts/a.parquet")
    for name, lines in (("choice", choice), ("exact", exact)):
        (root / name).mkdir()
        (root / name / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "prompts").mkdir()
    (root / "prompts" / "prompts.txt").write_text("In the beginning\nAnd it came to pass é\n\nlast\n")


def _run(root: Path) -> tuple[PretrainConfig, Trainer]:
    """A run of two steps and its trainer, all below `root`, the working directory."""
    prepare(Recipe(source="text.jsonl", vocab_size=262), Path("store"))
    overrides = ["experiment=tiny", "data.store=store/train", "data.heldout=store/heldout", "observe.wandb=off"]
    overrides += ["observe.progress=false", "run.directory=runs", "run.name=case", "run.threads=1", "run.device=cpu"]
    overrides += ["data.sequence_length=16", "run.eval_every_steps=1", "run.micro_batch_sequences=2"]
    overrides += [f"schedule.{field}=2" for field in ("batch_start_sequences", "batch_full_sequences")]
    overrides += ["schedule.total_tokens=64", "checkpoint.keep=1", "checkpoint.asynchronous=false"]
    config = compose(overrides)
    config = replace(config, model=replace(TINY, vocab_size=262, num_nextn_predict_layers=1))
    components = build_alone(config)
    trainer = Trainer(config, components)
    trainer.spikes = SpikeState(dropped=((100, 4),))
    trainer.fit()
    metrics = root / "runs/case/metrics.jsonl"
    # Times and speeds differ from build to build.
    fixed = {"time_unix_s": 1.5e9, "speed/tokens_per_s": 1000.0}
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    # As if everything had been made void once.
    back = {"event": "rollback", "step": 0, "left_at_step": 2, "dropped_positions": [[100, 4]], "time_unix_s": 0}
    lines = [*lines, back, *lines[1:]]
    texts = [
        json.dumps({k: fixed[k] + i if k in fixed else v for k, v in line.items()}) for i, line in enumerate(lines)
    ]
    metrics.write_text("".join(text + "\n" for text in texts))
    (root / "runs/case/lock").write_text(json.dumps({"host": "node1", "pid": 1}))
    return config, Trainer(config, components)


@contextmanager
def _lock_held(folder: Path) -> Iterator[None]:
    """Another trainer has the directory."""
    import fcntl

    with (folder / "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


class _Answers:
    """The readers, each as its command calls it."""

    def __init__(self, root: Path, config: PretrainConfig, trainer: Trainer) -> None:
        self.root, self.config, self.trainer = root, config, trainer
        self.tokenizer = load_tokenizer(root / "store/tokenizer.json")
        self.records, self.events = read_run(root / "runs/case"), read_events(root / "runs/case")

    def store(self, folder: Path) -> Any:
        opened = TokenStore.open(folder / "train")
        opened.check(vocab_size=262)
        return [opened.document(i).tolist() for i in range(opened.manifest.documents)]

    def resume(self, folder: Path) -> Any:
        """As `torchrun launch/pretrain.py` does: the lock, then the newest whole checkpoint."""
        trainer = self.trainer
        trainer.directory = folder
        for tensor in trainer.tensors().values():
            (tensor if isinstance(tensor, Tensor) else tensor.tensor).zero_()
        with locked(folder):
            trainer.resume()
        held = {name: t if isinstance(t, Tensor) else t.tensor for name, t in trainer.tensors().items()}
        return digest(held), trainer.state, trainer.changed

    def sinks(self, folder: Path) -> Any:
        """The log of a resumed run, which repeats the steps that it has."""
        with locked(folder), Sinks(JsonlSink(folder / "metrics.jsonl"), console=None, wandb=None) as sinks:
            for record in self.records:
                sinks.write({name: value for name, value in record.items() if name in METRICS and name != SCORE})
            for event in self.events:
                details = {name: value for name, value in event.items() if name not in ("event", "step")}
                sinks.event(event["event"], step=event["step"], **details)
            return sinks.jsonl.replays_differing

    def records_of(self, folder: Path) -> Any:
        records, events = read_run(folder), read_events(folder)
        steps = [record["step"] for record in records]
        assert steps == sorted(set(steps)), steps
        return len(records), len(events)

    def dashboard(self, folder: Path) -> Any:
        render([folder], folder / "page.html")
        return (folder / "page.html").stat().st_size > 0

    def lock(self, folder: Path) -> Any:
        if not (folder / "lock").is_file():
            with locked(folder):
                return "in use"
        try:
            with _lock_held(folder), locked(folder):
                raise AssertionError("a directory was locked twice")
        except ValueError as error:
            # Right: that another process has it is the answer.
            if "is in use" not in str(error):
                raise
            return "in use"

    def weights(self, folder: Path) -> Any:
        """As `launch/score.py` and `launch/generate.py` open a run."""
        source = open_weights(folder)
        tokens = tokenizer_of(source).encode_batch(["the king"])
        values = digest({name: source.read(name) for name in source.names()})
        return values, source.config, source.precision, source.trained_on, tokens

    def hf(self, folder: Path) -> Any:
        source = HfReader(folder)
        tokenizer_of(source)
        source.check_shared_copies()
        return source.config, digest({name: source.read(name) for name in source.names()})

    def verified(self, folder: Path) -> Any:
        plan = export(open_weights(self.root / "runs/case"), self.root / "again", ExportOptions("fp8")).plan
        verify_export(open_weights(self.root / "runs/case"), folder, plan)
        return self.hf(folder)

    def exported_again(self, folder: Path) -> Any:
        """The same export into a damaged folder repairs it, or says why not."""
        source = open_weights(self.root / "runs/case")
        done = export(source, folder, ExportOptions("fp8"))
        verify_export(source, folder, done.plan)
        return self.hf(folder)

    def texts(self, folder: Path) -> Any:
        """As `launch/prepare.py` reads its sources."""
        return [list(read_texts(file, "text")) for file in sorted(folder.iterdir())]

    def tokens(self, folder: Path) -> Any:
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        ids = tokenizer.encode_batch(["the king said é"])
        return ids, tokenizer.decode(ids[0])

    def prompts(self, folder: Path) -> Any:
        return self.tokenizer.encode_batch(read_prompts([], folder / "prompts.txt"))

    def questions(self, folder: Path) -> Any:
        choice = [folder / "choice.jsonl"] if (folder / "exact.jsonl").exists() is False else []
        exact = [] if choice else [folder / "exact.jsonl"]
        files = read_files(Suite(choice=choice, exact=exact))
        texts = [question_prompt("letters", q, []) for each in files.choices.values() for q in each]
        texts += [p.problem + p.answer for each in files.problems.values() for p in each]
        # As they are tokenised, and written to the scores.
        self.tokenizer.encode_batch(texts)
        return json.dumps([list(files.choices.values()), list(files.problems.values())], default=vars).encode()

    def configuration(self, folder: Path) -> Any:
        before, train.config.CONFIGS = train.config.CONFIGS, folder / "configs"
        # What stands for a command line; without it there are no overrides.
        file = folder / "overrides.txt"
        try:
            return compose(file.read_text("utf-8", "surrogateescape").split("\n") if file.is_file() else [])
        finally:
            train.config.CONFIGS = before


def readers(root: Path) -> dict[str, Reader]:
    """Make the corpus in an empty folder, which becomes the working directory, and list the readers."""
    os.chdir(root)
    datasets.disable_progress_bars()
    _texts(root)
    with redirect_stdout(io.StringIO()):
        config, trainer = _run(root)
    answers = _Answers(root, config, trainer)
    run, hf = root / "runs/case", root / "hf"
    source = open_weights(run)
    export(source, hf, ExportOptions("fp8", shard_bytes=60_000))
    export(source, root / "again", ExportOptions("fp8"))
    for name, parts in {
        "resume": [STEP, "lock"],
        "sinks": ["metrics.jsonl", "lock"],
        "dashboard": ["metrics.jsonl", "run_card.json", "config.yaml"],
        "tokenizer": [],
    }.items():
        for part in parts:
            target = root / name / part
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (run / part).is_dir() else shutil.copy)(run / part, target)
    summary = {"heldout_bits_per_byte": 1.5, "baselines_bits_per_byte": {"xz": 1.7, "unigram": 2.6}}
    (root / "dashboard/summary.json").write_text(json.dumps(summary))
    shutil.copytree(root / "store", root / "stored")
    (root / "tokenizer").mkdir()
    shutil.copy(root / "store/tokenizer.json", root / "tokenizer")
    shutil.copytree(train.config.CONFIGS, root / "settings/configs")
    overrides = ["experiment=tiny", "+cluster=h100_1", "run.name=a", "schedule.lr_peak=1e-3", "optim.betas=[0.9,0.95]"]
    (root / "settings/overrides.txt").write_text("\n".join(overrides))
    keys = ("configs/", "is not a configuration key", *train.config._dotted_names(PretrainConfig, ""))
    keys += tuple(f"{group}=" for group in train.config._groups())
    shown, os_too = (ValueError, OSError, OverflowError), (ValueError, OSError)
    resume, free = Reader(root / "resume", answers.resume, 8, equal=True, links=True, files=f"{STEP}/*"), ("store",)
    stored = Reader(root / "stored", answers.store, 8, equal=True, links=True, files="train/*")
    # Our own export, whose plan is that of one file.
    verified = Reader(root / "again", answers.verified, 3, os_too, equal=True)
    return {
        "store": stored,
        "store, hashes forged": replace(stored, share=8, equal=False, forged=True),
        "resume": resume,
        "resume, hashes forged": replace(resume, share=12, equal=False, forged=True),
        "weights": replace(resume, read=answers.weights, exits=os_too, share=5, free=free),
        "weights, hashes forged": replace(
            resume, read=answers.weights, exits=os_too, share=10, equal=False, forged=True, free=free
        ),
        "metrics when resumed": Reader(root / "sinks", answers.sinks, 8, links=True, files="metrics.jsonl"),
        "lock of another": Reader(root / "sinks", answers.lock, 1, files="lock"),
        "metrics as records": Reader(root / "sinks", answers.records_of, 5, files="metrics.jsonl"),
        "dashboard": Reader(root / "dashboard", answers.dashboard, 4, shown),
        "Hugging Face folder": Reader(hf, answers.hf, 9, os_too),
        "verified export": verified,
        "export gone on with": replace(verified, read=answers.exported_again, share=1),
        "text to prepare": Reader(root / "texts", answers.texts, 5),
        "tokenizer": Reader(root / "tokenizer", answers.tokens, 3, os_too),
        "prompts": Reader(root / "prompts", answers.prompts, 3, os_too),
        "choice questions": Reader(root / "choice", answers.questions, 5, os_too),
        "exact-match problems": Reader(root / "exact", answers.questions, 5, os_too),
        "configuration": Reader(root / "settings", answers.configuration, 1, named=keys),
    }
