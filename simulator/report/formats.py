"""Numbers as people read them."""

from __future__ import annotations

from simulator.campaign.curve import Bound
from simulator.campaign.interval import Interval

NOTHING = "-"


def percent(value: Interval | None) -> str:
    """`93.4 % [92.8, 94.0]`."""
    return _with_interval(value, 100.0, 1, " %")


def short_percent(value: Interval | None) -> str:
    """`93.4 ±0.6`: for narrow tables whose heading says per cent."""
    if value is None:
        return NOTHING
    if value.low is None or value.high is None:
        return f"{100 * value.mean:.1f}"
    return f"{100 * value.mean:.1f} ±{50 * (value.high - value.low):.1f}"


def milliseconds(value: Interval | None) -> str:
    """The value alone, with a decimal below 100 ms."""
    if value is None:
        return NOTHING
    number = 1e3 * value.mean
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def number(value: Interval | None, decimals: int = 1) -> str:
    """`12.3 [11.9, 12.7]`."""
    return _with_interval(value, 1.0, decimals, "")


def tier_label(name: str, tpot_s: float | None) -> str:
    """One spelling everywhere: a tier that is called by its pace, such as `t20`, is shown as `20ms`."""
    if tpot_s is None or name not in {f"t{1e3 * tpot_s:g}", f"t{round(1e3 * tpot_s)}"}:
        return name
    return f"{name[1:]}ms"


def bounded(value: Interval, bound: Bound, decimals: int) -> str:
    """A value that may be a bound: `at least 12.3`. The interval of a bound would mean nothing."""
    if bound is Bound.EXACT:
        return number(value, decimals)
    if bound is Bound.UNKNOWN:
        return "not found in the range"
    return f"{bound.value} {value.mean:,.{decimals}f}"


def _with_interval(value: Interval | None, scale: float, decimals: int, unit: str) -> str:
    if value is None:
        return NOTHING
    shown = f"{scale * value.mean:,.{decimals}f}{unit}"
    if value.low is None or value.high is None:
        return shown
    return f"{shown} [{scale * value.low:,.{decimals}f}, {scale * value.high:,.{decimals}f}]"
