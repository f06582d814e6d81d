"""A store that was altered after preparing: one sentence or the right ids, whatever was changed and when."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launch.prepare import main
from tests.data.handmade import as_format_1, consecutive, flip, resealed, signed, write_store
from train.data.blocks import DamagedData
from train.data.index import Index
from train.data.store import TokenStore, store_hashes

DOCUMENTS = consecutive([5, 1, 40, 17, 3, 90, 33, 8])
BLOCK_BYTES = 64
DATA = "data-00000-of-00001.arrow"


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return write_store(tmp_path / "store", DOCUMENTS, block_bytes=BLOCK_BYTES)


def read_all(folder: Path) -> list[list[int]] | str:
    """The documents, or the sentence that refuses them."""
    try:
        store = TokenStore.open(folder)
        return [store.document(index).tolist() for index in range(len(DOCUMENTS))]
    except ValueError as refused:
        return str(refused)


def is_sentence(found: list[list[int]] | str, folder: Path) -> bool:
    return isinstance(found, str) and found.startswith("store: ") and str(folder) in found


def mutate(content: bytes, chooser: random.Random) -> bytes:
    """One of the changes that disks, editors and people make."""
    at, what = chooser.randrange(len(content)), chooser.randrange(6)
    other = bytes(chooser.randrange(256) for _ in range(chooser.randrange(1, 9)))
    return [
        content[:at] + other + content[at + len(other) :],
        content[:at],
        content[:at] + other + content[at:],
        content[:at] + bytes(len(content) - at),
        content[at:] + content[:at],
        b""
        if chooser.random() < 0.2
        else content[:at] + chooser.choice([b"null", b"-1", b"[", b'"', b"1e999"]) + content[at:],
    ][what]


@pytest.mark.parametrize("name", ["manifest.json", "index.bin", "state.json", "dataset_info.json", DATA])
def test_of_a_mutated_file_there_is_one_sentence_or_the_right_ids(store: TokenStore, name: str) -> None:
    file, chooser = store.path / name, random.Random(0)
    whole = file.read_bytes()
    for _ in range(150):
        file.write_bytes(mutate(whole, chooser))
        found = read_all(store.path)
        assert found == DOCUMENTS or is_sentence(found, store.path), found
    file.write_bytes(whole)
    assert read_all(store.path) == DOCUMENTS


VALUES = (None, True, -1, 0, 2**80, 1.5, "x", "../x", [], {}, {"x": {}}, {"x": {"num_bytes": -1, "sha256": "0"}})


def test_a_manifest_whose_author_knows_its_hash_is_checked_value_by_value(store: TokenStore) -> None:
    file = store.path / "manifest.json"
    whole = json.loads(file.read_text())
    for name in whole:
        for value in VALUES:
            file.write_text(json.dumps(signed(whole | {name: value})))
            found = read_all(store.path)
            assert found == DOCUMENTS or is_sentence(found, store.path), (name, value, found)


def test_an_index_whose_author_knows_its_hash_reads_nothing_outside_the_files(store: TokenStore) -> None:
    chooser = random.Random(0)

    def changed(index: Index) -> Index:
        numbers = np.concatenate([index.starts, index.runs.ravel()])
        value = chooser.choice([-1, 0, 1, 7, 10**4, 2**40, 2**62, -(2**63)])
        numbers[chooser.randrange(len(numbers))] = value
        return index._replace(starts=numbers[: len(index.starts)], runs=numbers[len(index.starts) :].reshape(3, -1))

    for _ in range(150):
        resealed(store.path, change_index=changed)
        found = read_all(store.path)
        # Other cuts of the same file are its author's business.
        assert is_sentence(found, store.path) or sum(map(len, found)) == sum(map(len, DOCUMENTS)), found


@pytest.mark.parametrize("name", ["manifest.json", "index.bin", "state.json", DATA])
@pytest.mark.parametrize("plant", [Path.symlink_to, lambda path, _: os.mkfifo(path), lambda path, _: path.mkdir()])
def test_a_link_or_a_pipe_in_place_of_a_file_is_refused(
    store: TokenStore, name: str, plant: Callable[[Path, Path], object]
) -> None:
    outside = store.path.parent / name
    (store.path / name).rename(outside)
    plant(store.path / name, outside)
    found = read_all(store.path)
    assert is_sentence(found, store.path), found
    assert name in found


def test_a_block_altered_after_it_was_read_is_found_and_costs_its_documents_only(store: TokenStore) -> None:
    assert read_all(store.path) == DOCUMENTS
    content = (store.path / DATA).read_bytes()
    places = [content.index(np.array(document, dtype="<i4").tobytes()) for document in DOCUMENTS]
    opened = TokenStore.open(store.path)
    before = [opened.document(index).tolist() for index in range(len(DOCUMENTS))]
    altered = places[5] + 100
    flip(store.path / DATA, altered)
    block = altered // BLOCK_BYTES
    assert before == DOCUMENTS
    for index, (place, document) in enumerate(zip(places, DOCUMENTS, strict=True)):
        if place // BLOCK_BYTES <= block <= (place + 4 * len(document) - 1) // BLOCK_BYTES:
            with pytest.raises(DamagedData, match=f"{DATA} does not have the sha256 of its block {block} ") as refused:
                opened.document(index)
            assert (refused.value.file, refused.value.block) == (DATA, block)
        else:
            assert opened.document(index).tolist() == document
    flip(store.path / DATA, altered)
    assert [opened.document(index).tolist() for index in range(len(DOCUMENTS))] == DOCUMENTS, (
        "restored, it is right again"
    )


@pytest.mark.parametrize("was_read", [False, True])
def test_a_file_cut_short_after_opening_is_a_sentence(store: TokenStore, was_read: bool) -> None:
    if was_read:
        store.document(7)
    os.truncate(store.path / DATA, 100)
    with pytest.raises(DamagedData, match=f"{DATA} ends at byte 100 of "):
        store.document(7)


@pytest.mark.parametrize(("position", "id_"), [(7, 10_000), (0, -1)])
def test_an_id_beyond_the_vocabulary_is_refused_although_its_hash_is_right(
    tmp_path: Path, position: int, id_: int
) -> None:
    documents = [list(document) for document in DOCUMENTS]
    documents[6][position] = id_
    folder = write_store(tmp_path / "store", documents, vocab_size=20_000).path
    resealed(folder, max_token_id=300)
    assert f"document 6 of {folder} has the id {id_ % 2**32}, beyond the manifest's largest, 300" in str(
        read_all(folder)
    )


def test_a_store_of_format_1_is_upgraded_by_one_command_and_keeps_the_identity_of_its_runs(
    store: TokenStore, capsys: pytest.CaptureFixture[str]
) -> None:
    as_format_1(store.path)
    assert f"`python launch/prepare.py --upgrade {store.path}`" in str(read_all(store.path))
    # The folder that holds a training and a held-out store.
    assert main(["--upgrade", str(store.path.parent)]) == 0
    assert read_all(store.path) == DOCUMENTS
    assert store_hashes(TokenStore.open(store.path)) == store_hashes(store)
    assert main(["--upgrade", str(store.path)]) == 0
    assert [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "index and hashes of blocks added",
        "whole, and has its hashes",
    ]


@pytest.mark.parametrize("name", ["state.json", DATA])
def test_what_was_altered_before_the_upgrade_is_refused_and_left_as_it_is(
    store: TokenStore, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    as_format_1(store.path)
    flip(store.path / name, 100)
    before = {file.name: file.read_bytes() for file in store.path.iterdir()}
    assert main(["--upgrade", str(store.path)]) == 2
    assert f"{name} has sha256" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in store.path.iterdir()} == before
