"""TokenStore: what was written is what is read, and what was altered is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.handmade import consecutive, write_store
from train.data.store import TokenStore, check_same_tokenizer, read_manifest


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return write_store(tmp_path / "store", consecutive([5, 1, 8]))


def edit_manifest(store: TokenStore, **changes: object) -> None:
    path = store.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_documents_come_back_over_many_arrow_batches(tmp_path: Path) -> None:
    # `datasets` writes batches of 1000 rows: 2503 documents lie in three of them.
    documents = consecutive([index % 7 + 1 for index in range(2503)])
    store = write_store(tmp_path / "store", documents)
    assert len(store.chunks) == 3
    assert [store.document(index).tolist() for index in range(2503)] == documents
    assert store.lengths.tolist() == [len(document) for document in documents]


def test_documents_are_read_only_views_of_the_file(store: TokenStore) -> None:
    document = store.document(2)
    assert not document.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        document[0] = 1


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


def test_an_unreadable_manifest_is_refused(store: TokenStore) -> None:
    (store.path / "manifest.json").write_text('{"documents": 3')
    with pytest.raises(ValueError, match=r"manifest.json is not readable JSON .*prepare the store again"):
        TokenStore.open(store.path)


def test_a_manifest_of_another_format_is_refused(store: TokenStore) -> None:
    edit_manifest(store, format_version=2)
    with pytest.raises(ValueError, match="has format_version 2, expected 1"):
        TokenStore.open(store.path)


@pytest.mark.parametrize("change", [{"special_ids": {"eos": 1}}, {"colour": "red"}, {"files": 5}])
def test_a_manifest_with_wrong_fields_is_refused(store: TokenStore, change: dict[str, object]) -> None:
    edit_manifest(store, **change)
    with pytest.raises(ValueError, match="lacks or misnames a field"):
        TokenStore.open(store.path)


def test_a_truncated_file_is_refused_on_opening(store: TokenStore) -> None:
    (file,) = store.path.glob("*.arrow")
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 1)
    with pytest.raises(
        ValueError, match=rf"has {size - 1} bytes where the manifest records {size}; the store is truncated"
    ):
        TokenStore.open(store.path)


def test_a_missing_file_is_refused_on_opening(store: TokenStore) -> None:
    (file,) = store.path.glob("*.arrow")
    file.unlink()
    with pytest.raises(ValueError, match=r"\.arrow is missing where the manifest records"):
        TokenStore.open(store.path)


def test_an_altered_file_of_equal_size_is_found_by_verify(store: TokenStore) -> None:
    store.verify()
    (file,) = store.path.glob("*.arrow")
    contents = bytearray(file.read_bytes())
    contents[-200] ^= 1
    file.write_bytes(contents)
    with pytest.raises(ValueError, match=r"\.arrow has sha256 .* the file was altered"):
        store.verify()


def test_contents_that_do_not_add_up_are_refused(store: TokenStore) -> None:
    edit_manifest(store, tokens=15)
    with pytest.raises(ValueError, match="holds 3 documents and 14 tokens where the manifest records 3 and 15"):
        TokenStore.open(store.path)
