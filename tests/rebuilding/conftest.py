"""One release, which every test here makes again."""

from collections.abc import Iterator

import pytest

from tests.support.recipes import Published, on_a_hub


@pytest.fixture(scope="package")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    with on_a_hub(tmp_path_factory.mktemp("published")) as made:
        yield made
