"""vLLM's own schedulers, driven, with made-up model outputs: the synchronous one and the asynchronous one.

The second is what GPUs run, **but it was not run on a GPU**. The checks are in
`tests/tiergate_engine/vllm/checks.py`; they run in vLLM's environment.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from deploy.vllm_cpu import server as engines
from tests.real_engine.conftest import EngineFiles

NAMES = (
    "undriven_it_fills_steps_as_vllm_does",
    "the_chunk_ordered_is_the_chunk_obeyed_on_top_of_decodes",
    "nobody_is_admitted_beyond_the_cap",
    "queued_prompts_are_served_by_deadline_and_relegated_ones_last",
    "time_on_the_way_to_the_engine_counts",
    "an_urgent_prompt_overtakes_one_that_is_being_served",
    "decodes_keep_their_promise_beside_a_long_prompt",
    "loose_decodes_are_left_out_and_stay_on_time",
    "a_plan_that_fails_leaves_vllms_own_step_and_is_said_once",
    "orders_that_lapse_leave_vllms_own_queue",
    "whatever_comes_everybody_gets_all_tokens",
    "facts_tell_each_step_and_its_time",
    "the_cost_that_is_told_is_what_was_spent_around_vllms_own_schedule",
    "an_untested_version_runs_vllms_own_scheduler_or_refuses",
    "the_control_routes_stand_behind_the_api_key",
)
LONGEST_S = 300


@pytest.fixture(scope="module")
def results(engine_files: EngineFiles, request: pytest.FixtureRequest) -> dict[str, str | None]:
    """What went wrong in each check; None where nothing did."""
    request.getfixturevalue("starting")  # the other tests' engine starts meanwhile
    done = subprocess.run(
        [str(engine_files.programs / "python"), "-m", "tests.tiergate_engine.vllm.checks"],
        cwd=engines.ROOT,
        env={**os.environ, **engines.ENVIRONMENT, "VLLM_PLUGINS": "none", "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("name", NAMES)
def test_in_vllms_environment(results: dict[str, str | None], name: str, kind: str) -> None:
    wrong = results[f"{name}[{kind}]"]
    assert wrong is None, wrong


def test_no_check_is_left_out(results: dict[str, str | None]) -> None:
    assert {name.partition("[")[0] for name in results} == set(NAMES)
