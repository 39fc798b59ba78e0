"""The page stands alone, is well formed and tells everything."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from simulator.campaign.curve import Bound
from simulator.campaign.goodput import Judged
from simulator.report.figures import draw
from simulator.report.page import conditions, page
from simulator.report.summary import compare
from simulator.report.values import GoodputRow, Setting, Study
from simulator.scenario import Fault, FaultKind
from tests.simulator.report.conftest import found, made_cell

FLEET = made_cell().fleet
_VOID = {"meta", "br", "img", "link", "hr", "input", "wbr"}


class Reader(HTMLParser):
    """Checks that tags close in order, and keeps what the tests look at."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.captions: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in _VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "action", "data"}:
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] == "caption":
            self.captions.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def html(study: Study) -> str:
    return page(study, draw(study))


def test_it_is_well_formed_and_has_every_table(html: str) -> None:
    reader = read(html)
    told = " | ".join(reader.captions)
    for caption in (
        "Conditions", "Goodput with 95 % intervals", "Ratios of goodputs", "one mechanism taken out",
        "Attainment of the worst tier", "Attainment, %, ±", "Times of the requests", "Cost.", "Latency profiles",
    ):  # fmt: skip
        assert caption in told
    assert len(reader.ids) == len(set(reader.ids))
    assert reader.tags.count("figure") == html.count("<figcaption>") == 10


def test_it_refers_to_nothing_outside(html: str) -> None:
    reader = read(html)
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    outside = [target for target in reader.references if not target.startswith(("#", "data:"))]
    assert outside == []
    assert re.findall(r"url\((?!#)[^)]*\)", html) == []
    assert "@import" not in html
    assert "http" not in html


def test_every_reference_inside_is_there(html: str) -> None:
    reader = read(html)
    inside = {target[1:] for target in reader.references if target.startswith("#")}
    inside |= set(re.findall(r"url\(#([^)]*)\)", html))
    assert inside <= set(reader.ids)


def test_it_says_that_it_is_simulated_and_escapes_what_it_is_given(html: str) -> None:
    text = "".join(read(html).text)
    assert "Simulated." in text
    assert "No engine ran" in text
    assert "Made-up <study> & more" in text
    assert "<study>" not in html


def test_figures_follow_the_theme(html: str) -> None:
    svg = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "var(--ink)" in svg
    assert "var(--series-0)" in svg
    for variable in set(re.findall(r"var\((--[\w-]+)\)", html)):
        assert f"{variable}:" in html


def test_it_tells_the_conditions(study: Study) -> None:
    (comparison,) = compare(study.runs)
    told = dict(conditions(comparison))
    assert "20ms 10 % (TPOT 20 ms)" in told["tiers"]
    assert told["TTFT"].startswith("300 ms, 500 ms, 1000 ms")
    assert told["seeds"] == "0, 1, 2"
    assert told["rates"] == "30, 40, 50, 60 requests/s"
    assert told["requests of a run"] == "500 warm-up, 2,000 measured, 500 cool-down, then drained"
    assert told["failures"] == "none"
    own = replace(comparison.setting, workload=replace(comparison.setting.workload, ttft_s=()))
    told = dict(conditions(replace(comparison, setting=own)))
    assert "20ms 10 % (TTFT 500 ms, TPOT 20 ms)" in told["tiers"]
    assert "TTFT" not in told
    fault = Fault(3, FaultKind.SLOW, 20.0, 10.0, 2.0)
    setting = replace(comparison.setting, fleet=replace(comparison.setting.fleet, faults=(fault,)))
    told = dict(conditions(replace(comparison, setting=setting)))
    assert told["failures"] == "backend 3 2 times as slow from 20 s for 10 s"


def test_rates_head_their_rows_and_promises_stand_beside_the_pace(html: str) -> None:
    assert html.count(">40 requests/s</span>") == 3
    assert "TPOT P99 20ms, promised 20" in html
    assert "no loss where an early first token left time" in html


def test_a_tier_that_is_called_by_its_pace_has_one_spelling(study: Study) -> None:
    (comparison,) = compare(study.runs)
    work = comparison.setting.workload
    tiers = tuple(
        replace(tier, name=name) for tier, name in zip(work.tiers, ("t20", "t3", "t50", "x"), strict=True)
    )
    setting = replace(comparison.setting, workload=replace(work, tiers=tiers))
    told = dict(conditions(replace(comparison, setting=setting)))["tiers"]
    assert [part.split()[0] for part in told.split("; ")] == ["20ms", "t3", "50ms", "x"]


def test_a_bound_is_not_shown_as_a_value(study: Study) -> None:
    setting = Setting.of(study.runs[0].cell)
    rows = tuple(
        GoodputRow(setting, name, found(50.0, bound=bound), 56.0)
        for name, bound in (("a", Bound.AT_LEAST), ("b", Bound.AT_MOST), ("c", Bound.UNKNOWN), ("d", Bound.EXACT))
    )
    text = page(replace(study, goodputs=rows), ())
    assert "at least 50.0</td>" in text
    assert "at most 50.0</td>" in text
    assert "not found in the range" in text
    assert "50.0 [48.5, 51.5]</td>" in text
    assert text.count("89.3 %") == 1


def test_overall_and_every_tier_stand_side_by_side(html: str) -> None:
    head = html[html.index("Goodput with 95") :]
    head = head[: head.index("</thead>")]
    assert head.index(Judged.OVERALL) < head.index(Judged.EVERY_TIER)


def test_each_of_many_settings_tells_its_own_conditions(study: Study) -> None:
    far = replace(study.runs[0], cell=replace(study.runs[0].cell, fleet=replace(FLEET, view_age_s=0.1)))
    text = page(replace(study, runs=(*study.runs, far)), ())
    captions = read(text).captions
    assert captions.count("Conditions") == 2
    assert captions.count("Settings") == 1
    assert text.index(">Settings<") < text.index(">Conditions<")
    assert "what one knows of the others is 100 ms old" in text
    assert "<h2>azure2023_conv on 8 x h200-llama-3.1-8b-bf16, views 100 ms old</h2>" in text


def test_a_study_without_searches_has_no_empty_sections(study: Study) -> None:
    bare = replace(study, goodputs=(), gains=(), ablations=(), marks=(), findings=(), profiles=(), rerun="")
    headings = re.findall(r"<h2>(.*?)</h2>", page(bare, ()))
    assert headings == ["What was run", "azure2023_conv on 8 x h200-llama-3.1-8b-bf16", "How to read this"]
