"""Jobs of several ranks, kept for the tests of a folder: other tests look for left processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks.pool import RankPool, closing_pools, pool


@pytest.fixture(scope="package")
def _pools() -> Iterator[None]:
    with closing_pools():
        yield


@pytest.fixture
def two_ranks(_pools: None) -> RankPool:
    return pool(2)


@pytest.fixture
def four_ranks(_pools: None) -> RankPool:
    return pool(4)
