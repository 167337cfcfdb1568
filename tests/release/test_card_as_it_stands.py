"""The card is true: its commands and its snippet run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.publish import publish
from tests.hub_server import LoopbackHub
from tests.support.released import REPO, ROOT, Project
from tests.support.releases import Build


def bash(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    python = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment = {**os.environ, **paths, **python}
    return subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )


def block(card: str, after: str, language: str = "bash") -> str:
    return card.partition(after)[2].partition(f"```{language}\n")[2].partition("```")[0]


def test_the_card_s_commands_check_the_download_and_build_the_same_bytes(
    build: Build, hub: LoopbackHub, tmp_path: Path
) -> None:
    publish(build().params())
    card = hub.read(REPO, "README.md").decode()
    checked = bash(block(card, "## Check it"), tmp_path)
    assert (checked.returncode, checked.stdout.splitlines()[-1]) == (0, "download: passed"), checked.stderr
    rebuilt = bash(block(card, "## Build it again"), tmp_path)
    assert rebuilt.returncode == 0, rebuilt.stderr
    promised = card.partition("come to these sha256:")[2].partition("```\n")[2].partition("```")[0]
    assert len(promised.splitlines()) == 2
    summed = bash(f"cd OUT && sha256sum --check <<'END'\n{promised}END\n", tmp_path)
    assert summed.returncode == 0, summed.stdout


def test_the_card_s_snippet_runs_as_it_stands(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against pocket, from the Hub; without torchvision the line that the README names goes before it."""
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project", monkeypatch, [])
    project.build()
    publish(project.params())
    card = hub.read(REPO, "README.md").decode()
    script = block(card, "\n# merged", "python")
    (tmp_path / "snippet.py").write_text(
        "from lora_fuse.pictures.render import allow_missing_torchvision\nallow_missing_torchvision()\n" + script
    )
    done = bash("python snippet.py", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    made = np.asarray(Image.open(tmp_path / "output.png").convert("RGB"), dtype=float)
    assert made.shape == (128, 128, 3)
    rabbit = made[40:110, 48:80].mean((0, 1))
    assert rabbit[2] > rabbit[1] + 20  # the rabbit of the case is purple: more blue than green
    assert made.std() > 30
