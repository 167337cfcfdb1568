"""A validation as JUnit XML, which every CI shows: a test for each question that was asked."""

from __future__ import annotations

from lora_fuse.studies.validation.outcome import Outcome
from lora_fuse.studies.validation.validation_report import ValidationReport


def junit_xml(validation: ValidationReport) -> str:
    """The XML file. A version that a person has to look at has a skipped test; a broken one has failures."""
    from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

    suite = TestSuite(f"validate {validation.recipe}")
    suite.add_property("lora", validation.new.label)
    suite.add_property("sha256", validation.new.sha256)
    suite.add_property("verdict", validation.verdict)
    for answer in validation.judgement.findings:
        case = TestCase(answer.question, f"lora_fuse.validation.{validation.recipe}")
        if not answer.holds:
            failure = Failure(answer.sentence or answer.measured, str(answer.cause))
            failure.text = f"measured {answer.measured}, limit {answer.limit}"
            case.result = [failure]
        suite.add_testcase(case)
    if validation.judgement.outcome is Outcome.CHANGED:
        look = TestCase("Has a person looked at the new pictures?", f"lora_fuse.validation.{validation.recipe}")
        look.result = [Skipped(validation.judgement.reason)]
        suite.add_testcase(look)
    xml = JUnitXml("lora-fuse")
    xml.add_testsuite(suite)
    text: str = xml.tostring().decode("utf-8")  # type: ignore[no-untyped-call]
    return text
