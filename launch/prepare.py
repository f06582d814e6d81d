"""Turn text or conversations into tokenised stores.

    python launch/prepare.py --source data/king_james_bible/text.jsonl --out stores/demo
    python launch/prepare.py --upgrade stores/demo

The second adds to stores of an earlier version what later ones have: an index with a hash for each block of the data.
What a source may be: train/data/sources.py. What is written: train/data/ingest.py. Bad input ends with one
sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Tokenise text into stores for pre-training.")
    parser.add_argument("--source", help="file, folder or hub dataset (owner/name[:config])")
    parser.add_argument("--out", type=Path, help="folder to make")
    parser.add_argument("--upgrade", type=Path, metavar="FOLDER", help="give stores of an earlier version their hashes")
    parser.add_argument("--format", choices=("text", "messages"), default="text", help="rows (default: text)")
    parser.add_argument("--text-field", default="text", help="field that holds the text (default: text)")
    parser.add_argument("--split", default="train", help="split of a hub dataset (default: train)")
    parser.add_argument("--tokenizer", default="bpe", help="bpe (train one), deepseek, or a tokenizer.json")
    parser.add_argument("--vocab-size", type=int, default=1024, help="ids of a trained one (default: 1024)")
    parser.add_argument("--chat-marks", action="store_true", help="a trained one has tokens for conversations")
    parser.add_argument(
        "--paragraphs", action="store_true", help="a folder of .txt: a document a paragraph, not a file"
    )
    parser.add_argument(
        "--first-token", choices=("bos", "eos"), help="of a conversation: eos, or bos for released weights"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="leave out longer conversations (default: none)")
    parser.add_argument("--heldout", type=float, default=0.1, help="share kept out, in whole files (default: 0.1)")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenise (default: 1)")
    options = parser.parse_args(arguments)
    if not options.upgrade and not (options.source and options.out):
        parser.error("--source and --out are required, or --upgrade alone")
    if options.format == "text" and (options.first_token or options.max_tokens):
        parser.error("--first-token and --max-tokens are for conversations: add --format messages")
    if options.upgrade and (options.source or options.out):
        parser.error("--upgrade takes no --source and no --out")
    return options


def main(arguments: list[str]) -> int:
    """Prepare stores as the command line says; returns the exit code."""
    options = parse(arguments)
    if options.upgrade:
        return upgrade_stores(options.upgrade)
    # Worker processes do the parallel work; threads inside a forked tokeniser would be refused with a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if options.workers <= 1 else "false")
    # Imported late: --help should not wait for `datasets`.
    import datasets

    from train.chat.ingest import ChatForm
    from train.data.forms import TextForm
    from train.data.ingest import Recipe, prepare, summary
    from train.data.sources import passed_by

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        values = {field.name: getattr(options, field.name) for field in fields(Recipe)}
        if is_chat := options.format == "messages":
            # A tokeniser that is trained on conversations has their marks.
            values["chat_marks"] = options.tokenizer == "bpe"
        form = ChatForm(options.first_token or "eos", options.max_tokens) if is_chat else TextForm()
        prepared = prepare(Recipe(**values), options.out, workers=options.workers, form=form)
    except (ValueError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {'reused, it was made from the same inputs' if prepared.reused else 'made'}")
    for store in filter(None, (prepared.train, prepared.heldout)):
        print(f"  {store.path.name}: {summary(store.manifest)}")
    if prepared.split:
        print(f"  {prepared.split}")
    if others := passed_by(options.source):
        print(f"  passed by, as hidden or of no known kind: {len(others)}, such as {others[0]}")
    return 0


def upgrade_stores(folder: Path) -> int:
    """Upgrade the stores of a folder and say which were old; returns the exit code."""
    from train.data.upgrade import upgrade

    try:
        for store, was_old in upgrade(folder).items():
            print(f"{store}: {'index and hashes of blocks added' if was_old else 'whole, and has its hashes'}")
    except (ValueError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
