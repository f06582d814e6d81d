"""A model that answers: behind an address, or served here for as long as a block runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from train.chat.engine import EngineName, ModelServer, free_port, running

if TYPE_CHECKING:
    from train.huggingface.names import Format

HOST = "127.0.0.1"


@contextmanager
def answering(
    model: str,
    kind: EngineName | None,
    format: Format | None,
    environment: Mapping[str, str],
    *,
    named: str | None = None,
) -> Iterator[tuple[str, str | None]]:
    """(address, name of the model) of a run or folder that an engine serves; of an address as it is, (address, named).

    The engine, transformers if not said, listens on a free port of loopback and ends with the block; a run is exported
    in BF16 if not said. Progress goes to stderr.

    Raises:
        ValueError: there is nothing to serve, or it has no chat template, or what is said is of the other kind.
        ChildProcessError: the engine ended by itself.
    """
    if "://" in model:
        if kind or format:
            raise ValueError(f"--engine and --format are of what is served here, and {model} is served; leave them out")
        yield model, named
        return
    if named is not None:
        raise ValueError(f"--model {named} names a model at an address, and {model} is none; leave it out")
    # Imported late: who asks an address should not wait for torch.
    from train.huggingface.export import ExportOptions
    from train.huggingface.served import served_folder

    if not Path(model).is_dir():
        raise ValueError(f"{model} is neither a folder nor an address; give runs/NAME or http://HOST:PORT")
    say = partial(print, file=sys.stderr, flush=True)
    kind = kind or "transformers"
    ModelServer(kind, Path(model), "model", HOST, 0).check_machine()
    with served_folder(Path(model), ExportOptions(format or "bf16"), say) as folder:
        engine = ModelServer(kind, folder.path, folder.exact_name, HOST, free_port(HOST))
        if not engine.chats:
            raise ValueError(
                f"{folder.path} has no chat template: its tokeniser is not known, or has no marks for conversations "
                "(launch/prepare.py --chat-marks); where the store of its run is gone, "
                "`python launch/serve.py RUN --tokenizer FILE` serves it"
            )
        with running(engine, environment, say):
            yield engine.url, engine.name
