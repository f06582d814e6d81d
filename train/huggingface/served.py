"""The folder that an engine serves: a Hugging Face folder as it is, of a run the export of a checkpoint.

    RUN/served/bf16/step_00000080    an export, whole for as long as somebody serves it
    RUN/served/bf16/lock             held while exports are made and removed

Exports of other checkpoints that nobody serves are removed before one is made. Locks are the kernel's (`flock`): they
go with their process. Where the file system has none, no other export is removed.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from train.chat.engine import NAME_CHARACTERS, name_for_clients
from train.checkpoint.publish import lock
from train.huggingface.export import Exported, ExportOptions, finished, refresh, remove
from train.huggingface.safetensors_files import JOURNAL
from train.huggingface.weights import CheckpointReader, open_weights

LOCK = "lock"


@dataclass(frozen=True)
class ServedFolder:
    """A folder for an engine; `name` for clients, `exact_name` with checkpoint and format of a run."""

    path: Path
    name: str
    exact_name: str


@contextmanager
def served_folder(model: Path, options: ExportOptions, say: Callable[[str], None]) -> Iterator[ServedFolder]:
    """The folder to serve of a run, a checkpoint or a Hugging Face folder, whole until the block ends.

    Raises:
        ValueError: there is nothing to serve, or the export cannot be made, or is in use as another one.
    """
    source = open_weights(model)
    if not isinstance(source, CheckpointReader):
        name = name_for_clients(model)
        yield ServedFolder(model, name, name)
        return
    run = source.path.parent.parent if source.path.parent.name == "checkpoints" else source.path.parent
    out = run / "served" / options.format / source.path.name
    with ExitStack() as in_use:
        with _alone_in(out.parent, say):
            done = _export(source, out, options)
            lock(in_use.enter_context((out / JOURNAL).open("rb")), fcntl.LOCK_SH)
        say(f"{out}: {source.path} as {options.format}, {'written' if done.written else 'as it was'}")
        for note in (*source.notes, *done.notes):
            say(f"  {note}")
        name = name_for_clients(run)
        # What tells exports apart is never cut off.
        which = f"-{source.path.name}-{options.format}"
        yield ServedFolder(out, name, name_for_clients(Path(name[: NAME_CHARACTERS - len(which)] + which)))


def _export(source: CheckpointReader, out: Path, options: ExportOptions) -> Exported:
    for journal in out.parent.glob(f"*/{JOURNAL}"):
        if journal.parent != out and _is_in_use(journal) is False:
            remove(journal.parent)
    if not (out / JOURNAL).exists() or not _is_in_use(out / JOURNAL):
        return refresh(source, out, options)
    if done := finished(source, out, options):
        return done
    raise ValueError(
        f"{out} is being served and is not what is asked for now: other weights, another tokeniser, or damaged; stop "
        "its server first"
    )


@contextmanager
def _alone_in(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("ab")
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror}); export elsewhere with launch/convert.py, and serve that"
        ) from None
    with file:
        if lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is False:
            say(f"{folder}: waiting for another process, which exports there")
            lock(file, fcntl.LOCK_EX)
        yield


def _is_in_use(journal: Path) -> bool | None:
    """Whether somebody serves it; None where nobody can tell."""
    with journal.open("rb+") as file:
        got = lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None if got is None else not got
