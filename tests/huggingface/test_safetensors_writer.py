"""A safetensors file written piece by piece is the one that its library reads, with every tensor aligned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from train.huggingface.safetensors_writer import DTYPES, Entry, Shard, header_of, write_shard

ODD = Shard(
    "odd.safetensors",
    (
        Entry("payload", "F8_E4M3", (5, 3)),
        Entry("scale", "F32", (1, 1)),
        Entry("norm", "BF16", (7,)),
        Entry("other payload", "F8_E4M3", (129, 1)),
        Entry("bias", "F32", (3,)),
    ),
)


def test_pieces_in_any_rhythm_are_read_back_by_the_library(tmp_path: Path) -> None:
    tensors = {e.name: torch.randn(e.shape).to(DTYPES[e.dtype]) for e in ODD.entries}
    pieces = []
    for name, tensor in tensors.items():
        rows = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        pieces += [(name, part.view(tensor.dtype)) for part in rows.split(2)]
    write_shard(tmp_path / ODD.file, ODD, pieces)
    found = load_file(tmp_path / ODD.file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_every_tensor_lies_at_a_multiple_of_its_item_size() -> None:
    header, places = header_of(ODD)
    assert len(header) % 8 == 0
    sizes = {entry.name: DTYPES[entry.dtype].itemsize for entry in ODD.entries}
    assert {name: first % sizes[name] for name, (first, _) in places.items()} == dict.fromkeys(sizes, 0)
    # Without gaps, which the format forbids.
    ends = sorted(places.values())
    assert [first for first, _ in ends] == [len(header), *(last for _, last in ends[:-1])]


def test_values_that_do_not_fill_their_place_are_noticed(tmp_path: Path) -> None:
    pieces = [(e.name, torch.zeros(e.shape, dtype=DTYPES[e.dtype])) for e in ODD.entries[:-1]]
    with pytest.raises(AssertionError, match=r"values of \['bias'\] do not fill"):
        write_shard(tmp_path / ODD.file, ODD, pieces)


def test_where_boxes_lie_is_said_as_dcp_says_it(tmp_path: Path) -> None:
    shard = Shard("box.safetensors", (Entry("w", "BF16", (2, 3), (4, 0)),))
    write_shard(tmp_path / shard.file, shard, [("w", torch.ones(2, 3).bfloat16())])
    with safe_open(tmp_path / shard.file, framework="pt") as file:
        assert file.metadata()["DCP_SHARDING_INFO"] == '{"w": {"saved_offsets": [4, 0]}}'
