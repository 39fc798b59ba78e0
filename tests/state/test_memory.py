"""What only the memory store promises: ages by its clock."""

from __future__ import annotations

import pytest

from scheduling.load import LoadVector
from state.contract import Publication
from state.memory import MemoryState


async def test_what_others_wrote_ages_from_when_it_was_seen() -> None:
    now_s = 100.0
    state = MemoryState(lambda: now_s)
    one, two = state.replica("one"), state.replica("two")
    await one.add_backend("x", None)
    assert await one.publish([Publication("x", LoadVector(decodes=1, age_s=2.0), 1)])
    now_s = 103.0
    assert (await two.view())["x"].foreign.age_s == pytest.approx(5.0)
    assert (await one.view())["x"].foreign.age_s == 0.0
