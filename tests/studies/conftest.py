"""One headless Chromium for the tests of pages.

It needs Debian's `chromium` (`.ci/setup dev` installs it). Without it these tests skip aloud; where CI=true they fail.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.studies.dashboard.chromium import Chromium, find_chromium


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    path = find_chromium()
    if path is None:
        say = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        say("no chromium here; CI installs one and fails without it: apt install chromium, or .ci/setup dev as root")
    with Chromium(path, tmp_path_factory.mktemp("profile")) as browser:
        yield browser
