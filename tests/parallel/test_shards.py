"""Who writes which part: every box once, the work shared, and no tensor with a hole or an overlap is accepted."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from parallel.pieces import Piece
from parallel.shards import Part, assign, part_of, read_parts, union


def cuts(generator: random.Random, length: int) -> list[tuple[int, int]]:
    """(start, length) of consecutive parts of one dim; some may be empty."""
    ends = sorted([0, length, *(generator.randint(0, length) for _ in range(generator.randint(0, 3)))])
    return [(start, end - start) for start, end in itertools.pairwise(ends)]


def grid(generator: random.Random, shape: tuple[int, ...]) -> list[Part]:
    """Boxes that tile a tensor."""
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for length in shape:
        spans = cuts(generator, length)
        boxes = [((*offset, start), (*size, n)) for offset, size in boxes for start, n in spans]
    return [Part(shape, "torch.float32", offset, size) for offset, size in boxes]


def covered(parts: list[Part]) -> torch.Tensor:
    """How often each element is held; brute force."""
    count = torch.zeros(parts[0].shape, dtype=torch.int64)
    for part in parts:
        count[tuple(slice(o, o + n) for o, n in zip(part.offset, part.size, strict=True))] += 1
    return count


@pytest.mark.parametrize("seed", range(30))
def test_every_element_has_exactly_one_writer(seed: int) -> None:
    generator = random.Random(seed)
    shape = tuple(generator.randint(0, 6) for _ in range(seed % 4))
    parts = grid(generator, shape)
    # One rank for each box, and a replica of each on another rank, in another order.
    shuffled = generator.sample(parts, len(parts))
    reports = [{"w": part} for part in parts + shuffled]
    names = assign(reports)
    written = [report["w"] for report, mine in zip(reports, names, strict=True) if mine]
    assert all(part.num_elements for part in written)
    assert sum(map(len, names)) == len({part for part in parts if part.num_elements})
    if math.prod(shape):
        assert (covered(written) == 1).all()


@pytest.mark.parametrize("seed", range(30))
def test_a_lost_or_a_grown_box_is_noticed(seed: int) -> None:
    generator = random.Random(seed)
    shape = tuple(generator.randint(1, 6) for _ in range(1 + seed % 3))
    parts = [part for part in grid(generator, shape) if part.num_elements]
    victim = generator.randrange(len(parts))
    lost = parts[:victim] + parts[victim + 1 :]
    with pytest.raises(ValueError, match=r"parts of tensor w .* hold \d+ of its \d+ elements"):
        assign([{"w": part} for part in lost] + [{"w": parts[victim]._replace(size=(0,) * len(shape))}])
    part = parts[victim]
    grown = [dim for dim in range(len(shape)) if part.offset[dim]]
    if grown:
        dim = grown[0]
        offset = tuple(o - (d == dim) for d, o in enumerate(part.offset))
        size = tuple(n + (d == dim) for d, n in enumerate(part.size))
        with pytest.raises(ValueError, match=r"parts of tensor w .* overlap"):
            assign([{"w": p} for p in [*lost, part._replace(offset=offset, size=size)]])


def test_replicas_go_to_the_ranks_with_least_to_write() -> None:
    """Rank 0 alone holds 400 bytes; eight replicas of 40 to 68 bytes, 432 in all, belong to ranks 1 and 2."""
    reports: list[dict[str, Part]] = [{} for _ in range(3)]
    reports[0]["own"] = Part((100,), "torch.float32", (0,), (100,))
    for index in range(8):
        size = 10 + index
        for report in reports:
            report[f"copy{index}"] = Part((size,), "torch.float32", (0,), (size,))
    names = assign(reports)
    assert names[0] == ["own"]
    bytes_of = [sum(4 * reports[rank][name].num_elements for name in names[rank]) for rank in (1, 2)]
    # The largest first leaves at most the smallest replica, 40 bytes, between the two.
    assert sum(bytes_of) == 432
    assert abs(bytes_of[0] - bytes_of[1]) <= 40


def test_parts_survive_json_and_ranks_must_agree_on_the_whole() -> None:
    piece = Piece(torch.zeros(2, 3, dtype=torch.bfloat16), (4, 3), (1, 0))
    part = part_of("w", piece)
    assert part == Part((4, 3), "torch.bfloat16", (1, 0), (2, 3))
    assert part_of("s", torch.tensor(1)) == Part((), "torch.int64", (), ())
    assert read_parts({"w": [[4, 3], "torch.bfloat16", [1, 0], [2, 3]]}) == {"w": part}
    assert union([{"w": part}, {}]) == {"w": {"shape": [4, 3], "dtype": "torch.bfloat16"}}
    with pytest.raises(ValueError, match=r"w is torch.bfloat16 \[4, 3\] on rank 0, but torch.bfloat16 \[4, 4\] on"):
        union([{"w": part}, {"w": part._replace(shape=(4, 4))}])
