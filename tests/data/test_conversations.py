"""Conversations as samples: whole, apart, a loss where the assistant speaks, and the same on every path."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.layout import Layout
from parallel.mesh import make_mesh, single
from tests.chat.chats import prepared, rows, vocabulary
from tests.data.handmade import write_store
from tests.ranks import run_ranks
from tests.tiny_model import FP32, TINY, frozen
from train.assemble import build_engine
from train.chat.ingest import ChatForm
from train.data.batch import IGNORE_INDEX, Batch
from train.data.best_fit import ConversationPacking, best_fit, epoch_tokens
from train.data.blocks import DamagedData
from train.data.config import DataConfig
from train.data.conversations import ConversationStream, iterate_conversations, open_conversations
from train.data.store import TokenStore
from train.data.stream import open_stores
from train.data.trained_on import FirstToken, TrainedOn
from train.evaluate.language_model import LanguageModel
from train.evaluate.score import score_store
from train.optim.config import OptimConfig
from train.schedules import ScheduledValues
from train.step import compute_gradients

LENGTH = 512
MODEL = replace(TINY, vocab_size=400, max_position_embeddings=LENGTH)
NOW = ScheduledValues(lr=1e-3, batch_sequences=4, bias_speed=0.0, mtp_weight=0.1, balance_alpha=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chats")
    lines = [json.dumps(row) for row in rows(60, seed=1)]
    return prepared(root, lines, form=ChatForm(max_tokens=LENGTH + 1), heldout=0.2).train.path.parent


@pytest.fixture
def store(folder: Path) -> TokenStore:
    return TokenStore.open(folder / "train")


def config(folder: Path, *, sequence_length: int = LENGTH) -> DataConfig:
    return DataConfig(
        str(folder / "train"),
        sequence_length=sequence_length,
        fim_rate=0.0,
        mask_documents=True,
        samples="conversations",
    )


def stream(store: TokenStore, *, seed: int = 5, mtp_depths: int = 1) -> ConversationStream:
    return ConversationStream(store, config(store.path.parent), seed, mtp_depths)


def conversations_of(batch: Batch) -> list[list[tuple[Tensor, Tensor]]]:
    """(input ids, labels) of every document of every sequence, the last of a row that is not full included."""
    assert batch.document_ids is not None
    found = []
    for ids, labels, numbers in zip(batch.input_ids, batch.labels, batch.document_ids, strict=True):
        assert (numbers.diff() >= 0).all()
        cuts = torch.bincount(numbers).tolist()
        found.append(list(zip(ids.split(cuts), labels.split(cuts), strict=True)))
    return found


def expected_of(store: TokenStore, index: int) -> tuple[list[int], list[int]]:
    ids, mask = store.document(index).tolist(), store.loss_mask(index).tolist()
    return ids[:-1], [id_ if has_loss else IGNORE_INDEX for id_, has_loss in zip(ids[1:], mask[1:], strict=True)]


@pytest.mark.parametrize("room", [7, 40])
def test_best_fit_is_the_naive_rule(room: int) -> None:
    rng = np.random.Generator(np.random.Philox(3))
    lengths = np.sort(rng.integers(1, room + 1, 300))[::-1].astype(np.int64)
    left: list[int] = []
    for length, sample in zip(lengths.tolist(), best_fit(lengths, room=room).tolist(), strict=True):
        fits = [each for each in left if each >= length]
        if sample == len(left):
            assert not fits, "a new sample where none has room"
            left.append(room)
        else:
            assert left[sample] == min(fits), "the least room that is enough"
        left[sample] -= length
    # First fit decreasing, and so best fit, needs at most 11/9 of the best packing (Johnson, 1974), plus one.
    assert len(left) <= 11 / 9 * -(-int(lengths.sum()) // room) + 1


def test_every_conversation_is_whole_and_once_in_every_epoch(store: TokenStore) -> None:
    samples = stream(store).packing.num_samples
    expected = sorted(expected_of(store, index) for index in range(store.manifest.documents))
    neighbours = []
    for epoch in range(3):
        batch, found = stream(store).take(epoch * samples, samples), []
        for row in conversations_of(batch):
            parts = [(ids.tolist(), labels.tolist()) for ids, labels in row]
            used = sum(len(ids) for ids, _ in parts)
            assert used == LENGTH
            if all(label == IGNORE_INDEX for label in parts[-1][1]):
                filler = parts.pop()[0]
                begun = [id_ for ids, _ in parts for id_ in ids]
                assert filler == (begun * 512)[: len(filler)], "what is left over is a copy without targets"
            found += parts
        assert sorted(found) == expected
        assert store.manifest.chat is not None
        assert batch.num_targets == store.manifest.chat.targets, "no target is lost at V3's one depth"
        neighbours.append([tuple(row[0][0].tolist()) for row in conversations_of(batch)])
    assert neighbours[0] != neighbours[1] != neighbours[2], "every epoch has an order of its own"
    assert epoch_tokens(store.path, LENGTH) == samples * LENGTH


def test_a_sample_is_a_function_of_seed_and_position(store: TokenStore) -> None:
    whole = stream(store).take(0, 40)
    walked = stream(store)
    parts = [walked.take(start, 8) for start in (32, 0, 16, 8, 24)]
    for start, part in zip((32, 0, 16, 8, 24), parts, strict=True):
        for name in ("input_ids", "labels", "document_ids"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[start : start + 8])
    assert not torch.equal(stream(store, seed=6).take(0, 40).labels, whole.labels)
    dropped = stream(store)
    dropped.dropped = ((1, 2),)
    assert torch.equal(dropped.take(0, 2).input_ids, whole.input_ids[[0, 3]])


@pytest.mark.parametrize("depths", range(5))
def test_no_depth_asks_one_conversation_for_anothers_tokens(store: TokenStore, depths: int) -> None:
    batch = stream(store, mtp_depths=depths).take(0, 20)
    assert batch.document_ids is not None
    for depth in range(1, depths + 1):
        apart = batch.document_ids[:, depth:] != batch.document_ids[:, :-depth]
        assert (batch.labels[:, depth:][apart] == IGNORE_INDEX).all()
    lost = stream(store, mtp_depths=0).take(0, 20).num_targets - batch.num_targets
    # Three tokens at least come before an answer: two labels that are no targets anyway.
    assert (lost == 0) == (depths <= 2), lost


@cache
def alone(path: Path, seed: int, count: int) -> tuple[float, float, int]:
    """Sums of main and MTP loss, and targets, of conversations one at a time, labelled as for `transformers`: -100."""
    store, net = TokenStore.open(path), frozen(MODEL)
    sums, targets = [0.0, 0.0], 0
    batch = stream(store, seed=seed, mtp_depths=2).take(0, count)
    whole = {tuple(store.document(i).tolist()[:-1]): i for i in range(store.manifest.documents)}
    for ids, labels in (part for row in conversations_of(batch) for part in row):
        if (labels == IGNORE_INDEX).all():
            continue
        index = whole[tuple(ids.tolist())]
        tokens = torch.from_numpy(store.document(index).astype(np.int64))
        learnt = torch.where(torch.from_numpy(store.loss_mask(index)), tokens, -100)
        output = net(tokens[None, :-1])
        hidden = [output.hidden, *output.mtp_hidden]
        for depth, states in enumerate(hidden):
            logits = net.logits(states)[0].double()
            asked = learnt[1 + depth :]
            sums[depth > 0] += float(F.cross_entropy(logits, asked, ignore_index=-100, reduction="sum"))
        targets += int((learnt != -100).sum())
    return sums[0], sums[1], targets


def packed_losses(rank: int, world: int, path: str, dp: int, micro_batches: int) -> tuple[float, float]:
    mesh = single("cpu") if world == 1 else make_mesh(
        Layout(dp=dp), device=torch.device("cpu"), tied_embedding=True, timeout_s=60
    )  # fmt: skip
    engine = build_engine(MODEL, FP32, OptimConfig(), mesh, seed=0)
    reference = frozen(MODEL).state_dict()
    for name, tensor in engine.models[0].state_dict().items():
        with torch.no_grad():
            tensor.copy_(reference[name])
    share = 4 // dp
    batch = stream(TokenStore.open(Path(path)), seed=9, mtp_depths=2).take(rank * share, share)
    result = compute_gradients(engine, batch, num_micro_batches=micro_batches, now=NOW)
    return float(result.loss_main), float(result.loss_mtp)


def check_against_alone(path: Path, found: tuple[float, float]) -> None:
    main, mtp, targets = alone(path, 9, 4)
    # 519 targets summed in FP32 against FP64: sqrt(519) x 2^-24 = 1.4e-6; measured 6e-8.
    assert targets == 519
    assert found[0] == pytest.approx(main / targets, rel=1.4e-6)
    # Two depths; each divides by the main model's N (eq. 24).
    assert found[1] == pytest.approx(mtp / 2 / targets, rel=1.4e-6)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_packed_step_is_the_mean_over_conversations_one_at_a_time(store: TokenStore, micro_batches: int) -> None:
    check_against_alone(store.path, packed_losses(0, 1, str(store.path), 1, micro_batches))


@pytest.mark.long
def test_a_packed_step_on_two_data_ranks_is_the_same_mean(store: TokenStore) -> None:
    for found in run_ranks(2, packed_losses, str(store.path), 2, 1):
        check_against_alone(store.path, found)


def test_a_score_counts_each_target_once(store: TokenStore) -> None:
    batches = list(iterate_conversations(store, sequence_length=LENGTH, batch_sequences=3))
    found = sorted(
        (ids.tolist(), labels.tolist())
        for batch in batches
        for row in conversations_of(batch)
        for ids, labels in row
        if (labels != IGNORE_INDEX).any()
    )
    assert found == sorted(expected_of(store, index) for index in range(store.manifest.documents))
    score = score_store(lambda batch: (2.0, batch.num_targets), store, sequence_length=LENGTH, batch_sequences=3)
    assert store.manifest.chat is not None
    assert (score.nats, score.tokens) == (2.0 * len(batches), store.manifest.chat.targets)


def test_a_conversation_longer_than_a_sample_is_refused(store: TokenStore) -> None:
    longest = int(store.lengths.max()) - 1
    ConversationPacking(store, longest)
    with pytest.raises(
        ValueError, match=rf"1 of \d+ .*=\d+ positions, the longest {longest}, .*--max-tokens {longest}`"
    ):
        ConversationPacking(store, longest - 1)


def test_stores_of_the_other_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    text = write_store(tmp_path / "text", [[5, 6, 7, 1]] * 9)
    windows = DataConfig(str(folder / "train"), sequence_length=4)
    with pytest.raises(ValueError, match=r"data\.store: .* holds conversations, .* train on it with \+stage=sft"):
        open_stores(windows, vocab_size=400, seed=1)
    with pytest.raises(ValueError, match=r"data\.store: .* holds text, .*--format messages"):
        open_conversations(replace(config(folder), store=str(text.path)), vocab_size=400, seed=1, mtp_depths=1)
    with pytest.raises(ValueError, match=r"data\.samples=conversations are kept apart .*set data\.mask_documents=true"):
        replace(config(folder), mask_documents=False)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"first_token": "bos"}, r"heldout begin with bos, those of .* with eos: prepare them with --first-token eos"),
        ({"template_sha256": "0"}, r"heldout have another chat template than those of .*: prepare both with one"),
    ],
)
def test_held_out_conversations_of_another_writing_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, str], sentence: str
) -> None:
    pair = replace(config(folder), heldout=str(folder / "heldout"))
    assert open_conversations(pair, vocab_size=400, seed=1, mtp_depths=1)[1] is not None
    store, heldout = (TokenStore.open(folder / name) for name in ("train", "heldout"))
    assert heldout.manifest.chat is not None
    altered = replace(heldout, manifest=replace(heldout.manifest, chat=replace(heldout.manifest.chat, **other)))
    monkeypatch.setattr("train.data.conversations.open_pair", lambda *_, **__: (store, altered))
    with pytest.raises(ValueError, match=rf"data\.heldout: conversations of .*{sentence}"):
        open_conversations(pair, vocab_size=400, seed=1, mtp_depths=1)


def test_a_model_does_not_score_conversations_that_begin_otherwise_than_its_samples(store: TokenStore) -> None:
    def model(first_token: FirstToken) -> LanguageModel:
        trained = TrainedOn(first_token, 9, tokenizer_sha256=store.manifest.tokenizer_sha256)
        cpu = torch.device("cpu")
        return LanguageModel(frozen(MODEL), cpu, name="runs/x", load_tokenizer=vocabulary, trained_on=trained)

    with pytest.raises(ValueError, match=r"train has conversations that begin with eos, runs/x trained on .* with bos"):
        model("bos").open_store(store.path)
    assert model("eos").open_store(store.path).manifest == store.manifest


def test_an_altered_loss_mask_is_refused(folder: Path, tmp_path: Path) -> None:
    """One bit of one token's mask: where it is read, in `verify`, and in a sample, which then has no targets."""
    good = TokenStore.open(folder / "train")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in good.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (name,) = good.manifest.data_files
    offset = int(good.runs[3][0]) + int(good.starts[4]) + 3
    content = bytearray((copy / name).read_bytes())
    content[offset] ^= 1
    (copy / name).write_bytes(content)
    bad = TokenStore.open(copy)
    with pytest.raises(DamagedData, match="does not have the sha256 of its block"):
        bad.loss_mask(4)
    with pytest.raises(ValueError, match="the file was altered"):
        bad.verify()
    batch = stream(bad).take(0, 2)
    assert len(batch.damaged) == 2
    assert batch.num_targets == 0


def test_the_format_rises_only_for_conversations(folder: Path, store: TokenStore, tmp_path: Path) -> None:
    chat = json.loads((store.path / "manifest.json").read_text())
    text = json.loads((write_store(tmp_path / "text", [[5, 6, 1]]).path / "manifest.json").read_text())
    assert (chat["format_version"], text["format_version"]) == (3, 2)
    assert "chat" not in text
    assert store.runs.shape[0] == 4
