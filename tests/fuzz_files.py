"""Damaged files against every reader: one sentence that names the file, or a right answer. Nothing else.

    python -m tests.fuzz_files --count 20000 --seed 1                      `make fuzz-files`
    python -m tests.fuzz_files --reader resume --seed 1 --index 17         one input again, with its traceback

Each input damages one file of a folder that the product wrote (`tests/fuzz_mutations.py`) and calls the function that a
command calls (`tests/fuzz_readers.py`). What counts as a defect: another exception than the command turns into its
sentence, a message that names neither file nor field or is no sentence, a wrong answer, a hang, the death of the
process, and the opening of a file outside the input's folder.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import sysconfig
import tempfile
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz_mutations import Damage, damaged
from tests.fuzz_readers import Reader, forge, readers

# No promise about time: an input that takes this long has hung.
HANG_S, DEAD_S = 20, 60
MEMORY_BYTES = 16 << 30
LONGEST_SENTENCE = 1000
BATCH = 200
ROOT = Path(__file__).resolve().parent.parent
# Python, its packages, this repository's own files, and the system's.
SYSTEM = tuple({*map(os.path.realpath, sysconfig.get_paths().values()), os.path.realpath(sys.prefix), "/dev", "/proc"})
SYSTEM += (os.path.realpath(sys.base_prefix), str(ROOT), "/sys", "/etc", "/usr/share", "/usr/lib")


class Outcome(NamedTuple):
    """`kind` is "right", "sentence" or a kind of defect."""

    kind: str
    detail: str = ""


class Hang(BaseException):
    """An input took too long."""


class OpenedFiles:
    """Names of files opened outside the allowed folders, as Python's audit hook sees them."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self.allowed, self.watching, self.outside = tuple(allowed), False, list[str]()
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.watching and isinstance(arguments[0], str | bytes | os.PathLike):
            self.watching = False
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if os.path.exists(path) and not any(path == a or path.startswith(f"{a}/") for a in self.allowed):
                self.outside.append(path)
            self.watching = True


def fault_of(message: str, named: Sequence[str]) -> str | None:
    """Why a message is no sentence that helps; None where it is one."""
    if "\n" in message or "\r" in message:
        return "has several lines"
    if len(message) > LONGEST_SENTENCE:
        return f"has {len(message)} characters"
    return None if any(name and name in message for name in named) else "names neither file nor field"


class Folder:
    """Where the inputs of one reader are laid out, one after the other."""

    def __init__(self, reader: Reader, work: Path) -> None:
        self.reader, self.case, self.outside = reader, work / "case", work / "outside"
        # Files of the same names with one bit changed: what is read there is no right answer.
        shutil.copytree(reader.folder, self.outside)
        for path in self.outside.rglob("*"):
            if path.is_file() and (content := bytearray(path.read_bytes())):
                content[-1] ^= 1
                path.write_bytes(content)

    def lay_out(self, seed: int, index: int, name: str) -> tuple[str, Damage]:
        """Make one input; returns the damaged file's name and what was done."""
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.reader.folder, self.case)
        chooser, files = random.Random(f"{name} {seed} {index}"), self.reader.names()
        file = files[index % len(files)]
        path = self.case / file
        damage = damaged(path.read_bytes(), file, chooser, outside=path.parent, links=self.reader.links)
        if damage.content is not None:
            path.write_bytes(damage.content.replace(str(path.parent).encode(), str(self.outside).encode()))
            if self.reader.forged:
                forge(self.case, file)
            return file, damage
        path.unlink()
        if damage.place == "folder":
            path.mkdir()
        elif damage.place == "link":
            shutil.copy(self.reader.folder / file, self.outside / file)
            path.symlink_to(self.outside / file)
        return file, damage


def judge(folder: Folder, file: str, damage: Damage, expected: Any, opened: OpenedFiles) -> Outcome:
    """Read one input."""
    reader = folder.reader
    named = (*reader.named, Path(file).name, str(folder.case), *(key for key in damage.keys if len(key) > 1))
    opened.outside.clear()
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        opened.watching = True
        answer = reader.read(folder.case)
    except reader.exits as error:
        fault = fault_of(str(error), named)
        outcome = Outcome(fault, f"{type(error).__name__}: {str(error)[:300]!r}") if fault else Outcome("sentence")
    except Hang:
        outcome = Outcome("hang", traceback.format_exc(limit=-4))
    except BaseException as error:  # noqa: BLE001  (also what a library in Rust raises when it panics)
        outcome = Outcome(f"traceback of {type(error).__name__}", traceback.format_exc(limit=-4)[-1500:])
    else:
        outcome = Outcome("right")
        if reader.equal and answer != expected:
            outcome = Outcome("wrong answer", "the file was accepted, and gave something else")
    finally:
        opened.watching = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    if opened.outside and not set(damage.keys) & set(reader.free):
        outcome = Outcome("read outside its folder", ", ".join(opened.outside))
    return outcome


def _raise_hang(*_: object) -> None:
    raise Hang


def run_batch(name: str, reader: Reader, work: Path, seed: int, indices: Sequence[int], out: Connection) -> None:
    """In a process of its own: (index, None) before each input, (index, file, damage, outcome) after it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _raise_hang)
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    logging.disable()
    warnings.simplefilter("ignore")
    shutil.rmtree(work, ignore_errors=True)
    folder = Folder(reader, work)
    shutil.copytree(reader.folder, folder.case)
    expected = reader.read(folder.case)
    opened = OpenedFiles((*SYSTEM, os.path.realpath(folder.case), *map(os.path.realpath, own_files(reader))))
    for index in indices:
        out.send((index, None))
        file, damage = folder.lay_out(seed, index, name)
        out.send((index, (file, damage.what, judge(folder, file, damage, expected, opened))))
    out.send(None)


def own_files(reader: Reader) -> list[Path]:
    """What a reader is given beside the input: an export's source and plan, the store with a run's tokeniser."""
    return [reader.folder.parent / name for name in ("runs", "again", "store")]


def outcomes(
    name: str, reader: Reader, work: Path, seed: int, indices: Sequence[int]
) -> dict[int, tuple[str, str, Outcome]]:
    """Index -> (file, damage, outcome), in as many processes as it takes."""
    context, found, left = multiprocessing.get_context("fork"), dict[int, tuple[str, str, Outcome]](), list(indices)
    while left:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=run_batch, args=(name, reader, work, seed, left[:BATCH], theirs))
        child.start()
        theirs.close()
        begun, done = None, False
        try:
            while ours.poll(DEAD_S) and (message := ours.recv()) is not None:
                begun = message[0]
                if message[1] is not None:
                    found[begun] = message[1]
            done = True
        except EOFError:
            pass
        # Neither Python's alarm nor an end: it hangs in a library.
        hangs = child.is_alive() and done and begun is not None and begun not in found
        if hangs:
            child.kill()
        child.join()
        if begun is None:
            raise RuntimeError(f"{name}: a process ended with {child.exitcode} before its first input")
        if begun not in found:
            found[begun] = ("", "", Outcome("hang" if hangs else f"process died ({child.exitcode})"))
        left = [index for index in left if index not in found]
    return found


def shares(chosen: dict[str, Reader], count: int) -> dict[str, int]:
    """Inputs of each reader, about `count` together."""
    total = sum(reader.share for reader in chosen.values())
    return {name: max(1, round(count * reader.share / total)) for name, reader in chosen.items()}


def table(found: dict[str, dict[int, tuple[str, str, Outcome]]], seed: int) -> tuple[list[str], int]:
    """Lines of the summary, and the number of defects."""
    lines = [f"{'reader':26}{'inputs':>8}{'right':>8}{'sentence':>10}{'defects':>9}"]
    examples: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    totals: Counter[str] = Counter()
    for name, each in found.items():
        kinds = Counter(outcome.kind for _, _, outcome in each.values())
        row = {"inputs": len(each), "right": kinds["right"], "sentence": kinds["sentence"]}
        row["defects"] = row["inputs"] - row["right"] - row["sentence"]
        totals.update(row)
        lines.append(f"{name:26}{row['inputs']:8}{row['right']:8}{row['sentence']:10}{row['defects']:9}")
        for index, (file, _, outcome) in sorted(each.items()):
            if outcome.kind not in ("right", "sentence"):
                examples[name, file, outcome.kind].append(index)
    lines.append(f"{'all':26}{totals['inputs']:8}{totals['right']:8}{totals['sentence']:10}{totals['defects']:9}")
    for (name, file, kind), indices in sorted(examples.items()):
        _, what, outcome = found[name][indices[0]]
        again = f'python -m tests.fuzz_files --reader "{name}" --seed {seed} --index {indices[0]}'
        lines.append(f"\n{name}, {file}: {kind}, {len(indices)} times, first {what}\n  {again}\n{outcome.detail}")
    return lines, totals["defects"]


def fuzz(count: int, seed: int, *, only: str | None = None, index: int | None = None) -> tuple[list[str], int]:
    """Try about `count` inputs; returns the summary and the number of defects."""
    with tempfile.TemporaryDirectory() as scratch:
        root, before = Path(os.path.realpath(scratch)), Path.cwd()
        for name in ("corpus", "work"):
            (root / name).mkdir()
        try:
            chosen = {name: each for name, each in readers(root / "corpus").items() if only in (None, name)}
            numbers = {name: range(size) for name, size in shares(chosen, count).items()}
            if index is not None:
                numbers = {name: range(index, index + 1) for name in chosen}
            found = {}
            for name, reader in chosen.items():
                found[name] = outcomes(name, reader, root / "work" / name, seed, numbers[name])
                print(table({name: found[name]}, seed)[0][1], file=sys.stderr, flush=True)
        finally:
            os.chdir(before)
    return table(found, seed)


def main(arguments: Sequence[str]) -> int:
    """Print the summary; 1 if there is a defect."""
    parser = argparse.ArgumentParser(description="Damaged files against every reader.")
    parser.add_argument("--count", type=int, default=20_000, help="inputs, about (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--reader", help="this one only")
    parser.add_argument("--index", type=int, help="this input only")
    options = parser.parse_args(arguments)
    lines, defects = fuzz(options.count, options.seed, only=options.reader, index=options.index)
    print("\n".join(lines))
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
