"""How long the shared store takes to be whole again after an outage: `python -m bench.healing [--runs N]`.

Runs the outages that the tests make on a real server (tests/state/test_sheltered_redis.py: three replicas under
load, their share asserted at every grant) and prints, for each, the time from the server's return until the store
counts for all again. Replicas ask a silent store every 50 ms there and give the others 0.3 s to tell what they
carry (200 ms and 0.8 s by default), so with a gateway's own settings it is up to 0.65 s more.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence

import pytest

_OUTAGES = "tests/state/test_sheltered_redis.py"


class _Times:
    """Collects what the tests recorded."""

    def __init__(self) -> None:
        self.healed_s: dict[str, list[float]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """pytest's hook."""
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name == "healed_s" and isinstance(value, float):
                    outage = report.nodeid.partition("::test_")[2].replace("_", " ")
                    self.healed_s[outage].append(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print. The exit status is that of the tests."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="times each outage is made")
    runs = parser.parse_args(arguments).runs
    times = _Times()
    for _ in range(runs):
        code = pytest.main(["-q", "-p", "no:cacheprovider", _OUTAGES], plugins=[times])
        if code:
            return int(code)
    print(f"\n{'healed after s: least':>22} {'most':>6}   after")
    for outage, healed_s in times.healed_s.items():
        print(f"{min(healed_s):22.2f} {max(healed_s):6.2f}   {outage}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
