"""Laws of the report and of the terminal's summary."""

import base64
import dataclasses
import hashlib
import html
import re

import numpy as np
import pytest

from lora_fuse.pictures.cases import Case
from lora_fuse.pictures.pages import SLIDER
from lora_fuse.pictures.picture import Picture
from lora_fuse.recipe.records import Lock, MergedLora
from lora_fuse.regression.case_judgement import examine
from lora_fuse.regression.gate import MEANINGS, summary_text
from lora_fuse.regression.report import Baseline, BlockChange, CaseReport, Report, report_html
from lora_fuse.regression.verdicts import Verdict
from tests.support.reports import (
    APART,
    EXACT,
    HOSTILE,
    MANIFEST,
    NO_GOLDEN,
    REGRESSION,
    RESIZED,
    REVIEW,
    RULES,
    SETUP,
    SHA,
    Tags,
    encoded,
    judged,
    metrics_of,
    page_of,
    scene,
)


def test_the_page_asks_the_network_for_nothing() -> None:
    page = report_html(page_of(EXACT, NO_GOLDEN, REGRESSION))
    for tag, attributes in Tags(page).found:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form", "svg"}
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,", "data:image/webp;base64,")), value[:80]
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_the_page_is_well_formed_and_every_picture_is_described() -> None:
    tags = Tags(report_html(page_of(EXACT, NO_GOLDEN, REGRESSION, RESIZED)))
    assert tags.open == []
    pictures = [attributes for tag, attributes in tags.found if tag == "img"]
    # input, golden, merged, unfused, two differences and the slider's two; without a golden of that size, fewer
    assert len(pictures) == 2 * 8 + 4 + 5
    assert all(attributes.get("alt") for attributes in pictures)


# What runs on the page


def scripts(page: str) -> list[str]:
    return re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL | re.IGNORECASE)


def test_the_script_is_there_once_and_is_the_one_that_the_policy_allows() -> None:
    page = report_html(page_of(EXACT, REGRESSION))
    assert scripts(page) == [SLIDER]
    digest = base64.b64encode(hashlib.sha256(scripts(page)[0].encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)">', page)
    rules = dict(rule.split(" ", 1) for rule in html.unescape(policy).split("; "))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
    }


def hostile() -> Report:
    case = judged(HOSTILE, scene(), scene(1), prompt=HOSTILE, elsewhere=HOSTILE, changed=(HOSTILE,))
    lora = MergedLora(HOSTILE, 1.0, HOSTILE, HOSTILE, None, HOSTILE)
    report = dataclasses.replace(page_of(case), recipe=HOSTILE, warnings=(HOSTILE,), environment={HOSTILE: HOSTILE})
    return dataclasses.replace(
        report,
        manifest=dataclasses.replace(MANIFEST, base=Lock(None, HOSTILE, None, None, {}), loras=(lora,)),
        setup=dataclasses.replace(SETUP, pipeline=HOSTILE, scheduler={"base_shift": HOSTILE}),
        verify={**report.verify, "passed": False, "problems": [HOSTILE]},
        blocks=(BlockChange(HOSTILE, 0.1),),
        next_step=HOSTILE,
    )


def test_what_others_wrote_is_text_and_never_markup() -> None:
    page = report_html(hostile())
    tags = Tags(page)
    assert [tag for tag, _ in tags.found].count("script") == 1
    assert scripts(page) == [SLIDER]
    assert tags.text.count("<script>alert(1)</script>") >= 15


def test_nothing_but_the_script_can_run() -> None:
    for report in (hostile(), page_of(EXACT, REGRESSION, REVIEW)):
        for _, attributes in Tags(report_html(report)).found:
            assert not any(name.startswith("on") for name in attributes)
            assert not any("javascript:" in (value or "") for value in attributes.values())


# What is on the page


def test_failures_come_first_and_every_case_is_there_twice() -> None:
    page = report_html(page_of(EXACT, NO_GOLDEN, REGRESSION))
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["bad", "fresh", "good"]
    assert "next: dvc repro what-is-next" in Tags(page).text
    assert re.findall(r'<a href="#case-\d">(.*?)</a>', page) == ["bad", "fresh", "good"]
    targets = {attributes.get("id") for _, attributes in Tags(page).found}
    assert {"case-1", "case-2", "case-3"} <= targets


def test_cases_of_one_verdict_keep_their_order() -> None:
    names = ["b", "c", "a"]
    page = report_html(page_of(*(judged(name, scene(), scene()) for name in names)))
    assert re.findall(r"<h2>(.*?)</h2>", page) == names


@pytest.mark.parametrize(
    "case", [NO_GOLDEN, REGRESSION, REVIEW, RESIZED, APART], ids=lambda case: case.result.case.name
)
def test_every_reason_is_on_the_page(case: CaseReport) -> None:
    page = html.unescape(report_html(page_of(EXACT, case)))
    assert case.result.reasons
    assert all(reason in page for reason in case.result.reasons)


def test_a_value_beyond_its_limit_is_marked_and_one_within_is_not() -> None:
    assert 'fails"' in report_html(page_of(REGRESSION))
    assert 'fails"' not in report_html(page_of(EXACT))


def test_what_it_was_built_from_and_the_warnings_are_on_the_page() -> None:
    text = Tags(report_html(page_of(EXACT))).text
    for fact in (
        "owner/base@0123",
        "owner/lora@4567",
        SHA,
        "scale 0.5",
        "0.75",
        "2.13.0+cpu",
        "seed 7",
        "0.42 s, 9.50 steps/s",
    ):
        assert fact in text
    assert "Warning: the LoRA was made for another base" in text


def test_wrong_weights_are_said_loudly_with_their_problems() -> None:
    wrong = {**page_of(EXACT).verify, "passed": False, "problems": ["attn.to_q: row 3 differs"]}
    page = report_html(dataclasses.replace(page_of(EXACT), verify=wrong))
    assert "The merged weights are wrong" in page
    assert "attn.to_q: row 3 differs" in page
    assert "wrong" not in report_html(page_of(EXACT))


def tiles(*cases: CaseReport, weights: bool = True) -> list[tuple[str, str, str]]:
    """Title, answer and sentence of the three gates."""
    report = page_of(*cases)
    report = dataclasses.replace(report, verify={**report.verify, "passed": weights})
    (section,) = re.findall(r'<section class="gates">(.*?)</section>', report_html(report), re.DOTALL)
    return re.findall(r'<span>(.*?)</span><span class="badge .*?">(.*?)</span></h3><p>(.*?)</p>', section)


@pytest.mark.parametrize(
    ("cases", "answers"),
    [
        ((EXACT,), ["passed", "passed", "passed"]),
        ((EXACT, NO_GOLDEN), ["passed", "passed", "open"]),
        ((REVIEW,), ["passed", "passed", "open"]),
        ((REGRESSION, NO_GOLDEN), ["passed", "passed", "failed"]),
        ((RESIZED,), ["passed", "passed", "failed"]),
        ((EXACT, APART), ["passed", "failed", "failed"]),
    ],
)
def test_the_three_gates_have_an_answer_each(cases: tuple[CaseReport, ...], answers: list[str]) -> None:
    found = tiles(*cases)
    assert [title for title, _, _ in found] == ["Weights", "Merged = base + LoRA", "As approved"]
    assert [answer for _, answer, _ in found] == answers


def test_the_gates_say_how_much_was_looked_at_and_what_failed() -> None:
    assert tiles(EXACT, weights=False)[0][1] == "failed"
    weights, run, golden = (sentence for _, _, sentence in tiles(EXACT, NO_GOLDEN, APART))
    assert weights == "840 weights derived again, 13,440 of 5,000,000 rows."
    assert run == "Not in apart."
    assert golden == "1 of 3 cases, 1 not approved here."


def test_what_changed_since_the_approval_is_a_list_with_the_cases_where_it_is_not_all() -> None:
    everywhere = "torch is 2.13, was 2.12"
    cases = [judged("a", scene(), scene(), changed=(everywhere, "seed is 0, was 1"))]
    cases += [judged("b", scene(), scene(), changed=(everywhere,)), NO_GOLDEN]
    page = report_html(page_of(*cases))
    (box,) = re.findall(r"<h3>What changed since.*?</section>", page, re.DOTALL)
    items = re.findall(r"<li>(.*?)</li>", box)
    assert items == [everywhere, 'seed is 0, was 1 <span class="soft">(a)</span>']


def test_where_nothing_changed_the_page_says_so_and_without_a_golden_it_says_nothing() -> None:
    assert "Nothing that is on record" in report_html(page_of(EXACT))
    assert "Nothing that is on record" not in report_html(page_of(REVIEW))
    assert "What changed" not in report_html(page_of(NO_GOLDEN))


@pytest.mark.parametrize(
    ("case", "slider", "maps"),
    [
        (EXACT, 1, ["golden", "unfused"]),
        (REVIEW, 1, ["golden", "unfused"]),
        (NO_GOLDEN, 0, ["unfused"]),
        (RESIZED, 0, ["unfused"]),
    ],
    ids=lambda case: case.result.case.name if isinstance(case, CaseReport) else "",
)
def test_slider_and_maps_are_there_for_pictures_of_one_size(case: CaseReport, slider: int, maps: list[str]) -> None:
    page = report_html(page_of(case))
    assert page.count('<input type="range"') == page.count('<figure class="slider" hidden>') == slider
    shown = re.findall(r'<img data-of="([\w-]+)"', page)
    assert len(shown) == 2 * slider
    assert all(page.count(f' id="{name}">') == 1 for name in shown)
    assert re.findall(r'alt="difference: merged to (\w+)"', page) == maps
    assert all(base64.b64encode(image.data).decode() in page for image in case.heat.values())
    assert ("approved elsewhere" in page) == (case is REVIEW)


def test_the_noise_floor_has_a_column_and_the_latents_their_multiple() -> None:
    rows = re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", report_html(page_of(APART)), re.DOTALL)
    cells = {name: re.findall(r"<td[^>]*>\s*([^<]*)", rest) for name, rest in rows}
    of_latents = [cell.strip() for cell in cells["latents, relative L2"]]
    assert of_latents[0] == "-"
    assert float(of_latents[1]) == pytest.approx(3 * float(of_latents[2]), rel=0.02)
    assert [cell.strip() for cell in cells["latents over the floor"]] == ["-", "3.00 x", "1 x"]
    limited = dataclasses.replace(page_of(APART), rules=dataclasses.replace(RULES, over_floor=2.0))
    assert "≤ 2 x ✗" in report_html(limited)
    assert "✗" not in report_html(page_of(EXACT))


def test_the_change_of_every_block_is_a_bar_and_the_largest_the_highest() -> None:
    page = report_html(page_of(EXACT))
    bars = re.findall(r'<span style="height: ([\d.]+)%" title="(.*?)"></span>', page)
    assert bars == [("50.0", "0: 0.02"), ("100.0", "1: 0.04")]
    still = dataclasses.replace(page_of(EXACT), blocks=(BlockChange("0", 0.0),))
    assert 'style="height: 0.0%"' in report_html(still)
    assert 'class="bars"' not in report_html(dataclasses.replace(page_of(EXACT), blocks=()))


def test_a_picture_of_another_size_is_shown_without_numbers() -> None:
    other = np.zeros((8, 8, 3), dtype=np.uint8)
    other[:4] = 200
    result = examine(Case("small", "", 0), Picture(other), Picture(scene()), [], RULES)
    assert "8x8" in report_html(page_of(CaseReport(result, (), encoded(other), encoded(scene()), None)))


def test_the_summary_names_every_case_its_verdict_and_the_report() -> None:
    text = summary_text(metrics_of(EXACT, NO_GOLDEN, REGRESSION), None, "out/report.html", "what comes next")
    lines = text.splitlines()
    assert lines[1].split() == ["good", "exact", "identical", "0", "identical", "0", "1.00", "-"]
    assert lines[2].split() == ["fresh", "no-golden", "-", "-", "identical", "0", "1.00", "-"]
    assert lines[3].split()[:2] == ["bad", "regression"]
    assert "below 40 dB" in text
    assert lines[-3] == f"FAILED, regression: {MEANINGS['regression']}"
    assert lines[-2] == "report: out/report.html"
    assert lines[-1] == "next: what comes next"
    assert "\x1b" not in text


def test_the_summary_s_columns_are_aligned() -> None:
    header, *rows = summary_text(metrics_of(EXACT, REGRESSION), None, "r", "n").splitlines()[:3]
    start = header.index("verdict")
    assert [row[start:].split()[0] for row in rows] == ["exact", "regression"]
    assert len({len(line) for line in (header, *rows)} - {len(header)}) <= 1


def test_a_passed_run_says_so() -> None:
    assert "passed, exact" in summary_text(metrics_of(EXACT), None, "r", "n")


def test_the_base_alone_is_shown_with_both_times_and_their_ratio() -> None:
    case = dataclasses.replace(EXACT, baseline=Baseline(encoded(scene(5)), 40, 4.0, seconds=12.0, merged_seconds=1.5))
    page = report_html(page_of(case))
    assert "40 steps at CFG 4.0" in page
    assert "12.00 s; merged 1.50 s: 8.0 times as fast" in page
    assert "base alone" not in report_html(page_of(EXACT))


def test_every_verdict_has_a_meaning() -> None:
    assert set(MEANINGS) == {verdict.value for verdict in Verdict}
