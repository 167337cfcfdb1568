"""Laws of the report and of the terminal's summary."""

from __future__ import annotations

import dataclasses
import html
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from lora_fuse.regression.metrics import Levels, amplified_difference, to_png
from lora_fuse.regression.report import (
    MEANINGS,
    Baseline,
    BuiltFrom,
    CaseReport,
    Difference,
    LoraRow,
    Report,
    WeightsCheck,
    report_html,
    summary_text,
)
from lora_fuse.regression.verdicts import CaseResult, Limits, Picture, Subject, Verdict, examine, flat_metrics, worst

LIMITS = Limits({"psnr_db": 40, "max_abs": 8})
SHA = "ab" * 32
HOSTILE = '<script>alert(1)</script> & "quoted" \''


def scene(seed: int = 0) -> Levels:
    return np.random.default_rng(seed).integers(60, 190, (16, 24, 3), dtype=np.uint8)


def judged(name: str, merged: Levels, golden: Levels | None, prompt: str = "make it purple") -> CaseReport:
    result = examine(
        Subject(name, prompt, seed=7),
        Picture(merged),
        Picture(merged),
        golden,
        unfused_limits=LIMITS,
        golden_limits=LIMITS,
    )
    other = merged if golden is None else golden
    difference = Difference("golden", 16, to_png(amplified_difference(merged, other, 16)))
    pictures = (to_png(merged), to_png(merged), None if golden is None else to_png(golden))
    return CaseReport(result, (to_png(scene(9)),), *pictures, (difference,))


def page_of(*cases: CaseReport) -> Report:
    return Report(
        recipe="pocket",
        verdict=worst(case.result.verdict for case in cases),
        built_from=BuiltFrom(
            base="owner/base@0123",
            loras=(LoraRow("lightning", "owner/lora@4567", SHA, 0.5),),
            pipeline="QwenImageEditPipeline",
            steps=4,
            true_cfg_scale=1.0,
            scheduler_shift="exponential, base and max shift 1.0986",
            sigmas=(1.0, 0.9, 0.75, 0.5, 0.0),
        ),
        weights=WeightsCheck(True, 840, 13440, 5_000_000, ()),
        environment={"device": "cpu", "torch": "2.13.0+cpu"},
        warnings=("the LoRA was made for another base",),
        unfused_limits=LIMITS,
        golden_limits=LIMITS,
        cases=cases,
    )


EXACT = judged("good", scene(), scene())
NO_GOLDEN = judged("fresh", scene(), None)
REGRESSION = judged("bad", scene(1), scene())


class Tags(HTMLParser):
    """Collects every tag with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_asks_the_network_for_nothing() -> None:
    page = report_html(page_of(EXACT, NO_GOLDEN, REGRESSION))
    for tag, attributes in Tags(page).found:
        assert tag not in {"script", "link", "iframe", "object"}
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), value[:80]
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_the_page_is_well_formed_and_every_picture_is_described() -> None:
    tags = Tags(report_html(page_of(EXACT, NO_GOLDEN, REGRESSION)))
    assert tags.open == []
    pictures = [attributes for tag, attributes in tags.found if tag == "img"]
    assert len(pictures) == 3 * 5 - 1  # input, golden, merged, unfused, difference; one golden is missing
    assert all(attributes.get("alt") for attributes in pictures)


def test_what_others_wrote_is_text_and_never_markup() -> None:
    case = judged(HOSTILE, scene(), scene(), prompt=HOSTILE)
    report = dataclasses.replace(page_of(case), recipe=HOSTILE, warnings=(HOSTILE,), environment={HOSTILE: HOSTILE})
    tags = Tags(report_html(report))
    assert "script" not in {tag for tag, _ in tags.found}
    assert tags.text.count("<script>alert(1)</script>") >= 6


def test_failures_come_first_and_every_case_is_there_twice() -> None:
    page = report_html(page_of(EXACT, NO_GOLDEN, REGRESSION))
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["bad", "fresh", "good"]
    assert re.findall(r'<a href="#case-\d">(.*?)</a>', page) == ["bad", "fresh", "good"]
    targets = {attributes.get("id") for _, attributes in Tags(page).found}
    assert {"case-1", "case-2", "case-3"} <= targets


def test_cases_of_one_verdict_keep_their_order() -> None:
    names = ["b", "c", "a"]
    page = report_html(page_of(*(judged(name, scene(), scene()) for name in names)))
    assert re.findall(r"<h2>(.*?)</h2>", page) == names


@pytest.mark.parametrize("case", [NO_GOLDEN, REGRESSION], ids=lambda case: str(case.result.verdict))
def test_every_reason_is_on_the_page(case: CaseReport) -> None:
    page = html.unescape(report_html(page_of(EXACT, case)))
    assert case.result.reasons
    assert all(reason in page for reason in case.result.reasons)


def test_a_value_beyond_its_limit_is_marked_and_one_within_is_not() -> None:
    assert 'fails"' in report_html(page_of(REGRESSION))
    assert 'fails"' not in report_html(page_of(EXACT))


def test_what_it_was_built_from_and_the_warnings_are_on_the_page() -> None:
    text = Tags(report_html(page_of(EXACT))).text
    for fact in ("owner/base@0123", "owner/lora@4567", SHA, "scale 0.5", "0.75", "2.13.0+cpu", "\u00d716", "seed 7"):
        assert fact in text
    assert "Warning: the LoRA was made for another base" in text


def test_wrong_weights_are_said_loudly_with_their_problems() -> None:
    wrong = WeightsCheck(False, 840, 13440, 5_000_000, ("attn.to_q: row 3 differs",))
    page = report_html(dataclasses.replace(page_of(EXACT), weights=wrong))
    assert "The merged weights are wrong" in page
    assert "attn.to_q: row 3 differs" in page
    assert "wrong" not in report_html(page_of(EXACT))


def test_a_picture_of_another_size_is_shown_without_numbers() -> None:
    other = np.zeros((8, 8, 3), dtype=np.uint8)
    other[:4] = 200
    result = examine(
        Subject("small", "", 0), Picture(other), Picture(scene()), None, unfused_limits=LIMITS, golden_limits=LIMITS
    )
    case = CaseReport(result, (), to_png(other), to_png(scene()), None, ())
    assert "8x8" in report_html(page_of(case))


def metrics_of(*cases: CaseReport) -> dict[str, object]:
    results: list[CaseResult] = [case.result for case in cases]
    return dict(flat_metrics(results))


def test_the_summary_names_every_case_its_verdict_and_the_report() -> None:
    text = summary_text(metrics_of(EXACT, NO_GOLDEN, REGRESSION), "out/report.html")
    lines = text.splitlines()
    assert lines[1].split() == ["good", "exact", "identical", "0", "identical", "0"]
    assert lines[2].split() == ["fresh", "no-golden", "-", "-", "identical", "0"]
    assert lines[3].split()[:2] == ["bad", "regression"]
    assert "below 40 dB" in text
    assert lines[-2] == f"FAILED, regression: {MEANINGS['regression']}"
    assert lines[-1] == "report: out/report.html"
    assert "\x1b" not in text


def test_the_summary_s_columns_are_aligned() -> None:
    header, *rows = summary_text(metrics_of(EXACT, REGRESSION), "r").splitlines()[:3]
    start = header.index("verdict")
    assert [row[start:].split()[0] for row in rows] == ["exact", "regression"]
    assert len({len(line) for line in (header, *rows)} - {len(header)}) <= 1


def test_a_passed_run_says_so() -> None:
    assert "passed, exact" in summary_text(metrics_of(EXACT), "r")


def test_the_base_alone_is_shown_with_both_times_and_their_ratio() -> None:
    case = dataclasses.replace(EXACT, baseline=Baseline(to_png(scene(5)), 40, 4.0, seconds=12.0, merged_seconds=1.5))
    page = report_html(page_of(case))
    assert "40 steps at CFG 4.0" in page
    assert "12.00 s; merged 1.50 s: 8.0 times as fast" in page
    assert "base alone" not in report_html(page_of(EXACT))


def test_every_verdict_has_a_meaning() -> None:
    assert set(MEANINGS) == {verdict.value for verdict in Verdict}
