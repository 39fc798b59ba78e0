"""One stand that the attacks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.adversary.stand import Stand, standing


@pytest.fixture
def stand(shared_stand: Stand) -> Stand:
    """Two emulated engines and a gateway. What it logged in earlier tests is not held against this one."""
    shared_stand.log_from = len(shared_stand.gateway.log())
    return shared_stand


@pytest.fixture(scope="session")
def shared_stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """Started once, for attacks that leave it running."""
    with standing(tmp_path_factory.mktemp("stand")) as made:
        yield made
