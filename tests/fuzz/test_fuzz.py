"""Every parser of foreign input, with some odd inputs, the same in every run; ``make fuzz`` has more of them."""

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.bounds import own_folder
from tests.fuzz.parsers import contents, hold, ready
from tests.fuzz.table import parsers

PARSERS = {name: parser for name, parser in parsers().items() if parser.examples}


@pytest.mark.parametrize("name", PARSERS)
def test_what_is_odd_is_read_or_refused_in_one_line_within_bounds(name: str) -> None:
    parser = PARSERS[name]
    valid = parser.valid()

    @settings(
        max_examples=parser.examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(contents(parser, valid))
    def odd(content: bytes) -> None:
        hold(parser, folder, content)

    with own_folder() as folder:
        ready(parser, folder)
        for content in valid:
            assert hold(parser, folder, content) == ""  # a valid one is no error
        odd()
