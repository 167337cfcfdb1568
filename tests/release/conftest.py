"""A project that is built from the Hub, and a key."""

from pathlib import Path

import pytest

from tests.hub_server import LoopbackHub
from tests.support.released import Build, Project, on_the_hub, private_key


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return private_key(tmp_path / "signing.pem")


@pytest.fixture
def build(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    def made(base: str | None = "apache-2.0", lora: str | None = "mit") -> Project:
        (tmp_path / "project").mkdir()
        project = Project(tmp_path / "project", monkeypatch, on_the_hub(hub, tmp_path, base, lora))
        project.build()
        return project

    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model/sub").mkdir(parents=True)
    (tmp_path / "model/a.txt").write_text("a")
    (tmp_path / "model/sub/b.txt").write_text("b")
    return tmp_path / "model"
