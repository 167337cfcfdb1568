"""The folders that publications and downloads start from."""

from pathlib import Path

import pytest

from tests.hub_server import LoopbackHub
from tests.support.downloads import BIG, FILE, LORA
from tests.support.publications import PUTS, XORBS, Place


@pytest.fixture
def place(tmp_path: Path, hub: LoopbackHub) -> Place:
    made = Place(tmp_path / "project", {"HF_XET_CLIENT_RETRY_BASE_DELAY": "100ms"})
    made.fill()
    made.configure()
    return made


@pytest.fixture(params=["xet", "lfs"])
def upload(request: pytest.FixtureRequest, place: Place) -> str:
    """The requests that carry large files, with Xet and without."""
    if request.param == "lfs":
        place.env["HF_HUB_DISABLE_XET"] = "1"
    return {"xet": XORBS, "lfs": PUTS}[request.param]


@pytest.fixture(params=["lfs", "xet"])
def transport(request: pytest.FixtureRequest, hub: LoopbackHub) -> str:
    hub.push(LORA, {FILE: BIG}, xet=request.param == "xet")
    return str(request.param)
