"""A validation as JUnit XML, which every CI shows: a test for each question that was asked."""

from __future__ import annotations

from lora_fuse.studies.validation.evidence import Outcome
from lora_fuse.studies.validation.report import Validation


def junit_xml(validation: Validation) -> str:
    """The XML file. A version that a person has to look at has a skipped test; a broken one has failures."""
    from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

    suite = TestSuite(f"validate {validation.recipe}")
    for name, value in (
        ("lora", validation.new.label),
        ("sha256", validation.new.sha256),
        ("verdict", validation.verdict),
    ):
        suite.add_property(name, value)
    for finding in validation.judgement.findings:
        case = TestCase(finding.question, f"lora_fuse.validation.{validation.recipe}")
        if not finding.holds:
            failure = Failure(finding.sentence or finding.measured, str(finding.cause))
            failure.text = f"measured {finding.measured}, limit {finding.limit}"
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
