"""Files that are whole or as they were: on a full disk, when their content fails, and beside a planted link."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.data.whole_file import write_whole


def test_text_bytes_and_lines_are_written_in_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in ("é\n", "é\n".encode(), iter(["é", "\n"])):
        path.write_text("before")
        write_whole(path, content)
        assert path.read_bytes() == "é\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_for_few_eyes_stays_so(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch(mode=0o600)
    write_whole(path, "after")
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_fails_leaves_the_file_as_it_was_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("before")

    def lines() -> Iterator[str]:
        yield "after"
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_whole(path, lines())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As on a full disk: the kernel takes a part.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{path}'"):
            write_whole(path, "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_the_place_of_the_draft_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("another's")
    (tmp_path / ".writing-a").symlink_to(outside)
    write_whole(tmp_path / "a", "mine")
    assert (outside.read_text(), (tmp_path / "a").read_text()) == ("another's", "mine")
