"""Which rank writes which shard: each once, the work shared, and no tensor with a hole or an overlap is accepted."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
import torch

from parallel.shards import LocalShard, Shard, TypedShard, assign_writers, global_tensors, read_report, typed_shard

Report = dict[str, TypedShard]


def cuts(generator: random.Random, length: int) -> list[tuple[int, int]]:
    """(start, length) of consecutive ranges of one dim; some may be empty."""
    ends = sorted([0, length, *(generator.randint(0, length) for _ in range(generator.randint(0, 3)))])
    return [(start, end - start) for start, end in itertools.pairwise(ends)]


def grid(generator: random.Random, shape: tuple[int, ...]) -> list[Shard]:
    """Shards that tile a tensor."""
    blocks: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for length in shape:
        spans = cuts(generator, length)
        blocks = [((*offsets, start), (*sizes, n)) for offsets, sizes in blocks for start, n in spans]
    return [Shard(shape, offsets, sizes) for offsets, sizes in blocks]


def reports_of(shards: list[Shard], name: str = "w") -> list[Report]:
    return [{name: TypedShard("torch.float32", shard)} for shard in shards]


def indices(shard: Shard) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.sizes, strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_every_element_has_exactly_one_writer(seed: int) -> None:
    generator = random.Random(seed)
    shape = tuple(generator.randint(0, 6) for _ in range(seed % 4))
    shards = grid(generator, shape)
    # One rank for each shard, and a replica of each on another rank, in another order.
    reports = reports_of(shards + generator.sample(shards, len(shards)))
    names = assign_writers(reports)
    written = [report["w"].shard for report, mine in zip(reports, names, strict=True) if mine]
    assert all(shard.numel for shard in written)
    assert sum(map(len, names)) == len({shard for shard in shards if shard.numel})
    if math.prod(shape):
        count = torch.zeros(shape, dtype=torch.int64)
        for shard in written:
            count[indices(shard)] += 1
        assert (count == 1).all()


@pytest.mark.parametrize("seed", range(30))
def test_a_lost_or_a_grown_shard_is_noticed(seed: int) -> None:
    generator = random.Random(seed)
    shape = tuple(generator.randint(1, 6) for _ in range(1 + seed % 3))
    shards = [shard for shard in grid(generator, shape) if shard.numel]
    victim = shards.pop(generator.randrange(len(shards)))
    with pytest.raises(ValueError, match=r"shards of tensor w .* hold \d+ of its \d+ elements"):
        assign_writers(reports_of([*shards, victim._replace(sizes=(0,) * len(shape))]))
    grown = [dim for dim in range(len(shape)) if victim.offsets[dim]]
    if grown:
        offsets = tuple(o - (d == grown[0]) for d, o in enumerate(victim.offsets))
        sizes = tuple(n + (d == grown[0]) for d, n in enumerate(victim.sizes))
        with pytest.raises(ValueError, match=r"shards of tensor w .* overlap"):
            assign_writers(reports_of([*shards, victim._replace(offsets=offsets, sizes=sizes)]))


def test_replicas_go_to_the_ranks_with_least_to_write() -> None:
    """Rank 0 alone holds 400 bytes; eight replicas of 40 to 68 bytes, 432 in all, belong to ranks 1 and 2."""
    reports: list[Report] = [{} for _ in range(3)]
    reports[0] |= reports_of([Shard.whole((100,))], "own")[0]
    for index in range(8):
        for report in reports:
            report |= reports_of([Shard.whole((10 + index,))], f"copy{index}")[0]
    names = assign_writers(reports)
    assert names[0] == ["own"]
    bytes_of = [sum(4 * reports[rank][name].shard.numel for name in names[rank]) for rank in (1, 2)]
    # The largest first leaves at most the smallest replica, 40 bytes, between the two.
    assert sum(bytes_of) == 432
    assert abs(bytes_of[0] - bytes_of[1]) <= 40


def test_shards_survive_json_and_ranks_must_agree_on_the_whole() -> None:
    held = typed_shard("w", LocalShard.at(torch.zeros(2, 3, dtype=torch.bfloat16), (4, 3), (1, 0)))
    assert held == TypedShard("torch.bfloat16", Shard((4, 3), (1, 0), (2, 3)))
    assert typed_shard("s", torch.tensor(1)) == TypedShard("torch.int64", Shard((), (), ()))
    assert read_report(json.loads(json.dumps({"w": held}))) == {"w": held}
    assert global_tensors([{"w": held}, {}]) == {"w": {"shape": [4, 3], "dtype": "torch.bfloat16"}}
    with pytest.raises(ValueError, match=r"w is torch.bfloat16 \[4, 3\] on rank 0, but torch.bfloat16 \[4, 4\] on"):
        global_tensors([{"w": held}, {"w": held._replace(shard=Shard((4, 4), (1, 0), (2, 3)))}])


def test_a_shard_of_flattened_rows_is_the_same_elements_of_the_flattened_tensor() -> None:
    tensor = torch.arange(8 * 5 * 7).view(8, 5, 7)
    rows = Shard((8, 5, 7), (2, 0, 0), (3, 5, 7))
    inner = Shard((3 * 35,), (11,), (20,))
    expected = tensor[indices(rows)].flatten()[indices(inner)]
    assert torch.equal(tensor.flatten()[indices(inner.of(rows.flatten()))], expected)
    with pytest.raises(AssertionError):
        Shard((8, 5, 7), (0, 0, 0), (8, 5, 3)).flatten()
    with pytest.raises(AssertionError):
        LocalShard.at(torch.zeros(3), (4,), (2,))
