"""What cannot be explained is one line and exit 2, whatever is wrong with it; what can be is, however odd."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from lora_fuse.cli import main

NAMES = [f"blocks.{block}.to_q" for block in range(3)]


def weights(path: Path, value: float = 0.0, names: list[str] = NAMES) -> Path:
    save_file({f"{name}.weight": np.full((16, 16), value, np.float16) for name in names}, path)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    weights(tmp_path / "base")
    factors: dict[str, npt.NDArray[np.float32]] = {}
    for name in NAMES:
        factors[f"{name}.lora_up.weight"] = np.zeros((16, 2), np.float32)
        factors[f"{name}.lora_down.weight"] = np.ones((2, 16), np.float32)
    save_file(factors, tmp_path / "zero")
    return tmp_path


@pytest.mark.parametrize(
    ("value", "names", "options", "said"),
    [
        (np.nan, NAMES, (), "checkpoint: 'blocks.0.to_q.weight' holds NaN or infinity"),
        (np.inf, NAMES, ("--lora", "zero"), "checkpoint: 'blocks.0.to_q.weight' holds NaN or infinity"),
        (1.0, [], (), "checkpoint has not 3 of the 3 weights of base, first 'blocks.0.to_q.weight'"),
        (1.0, NAMES, ("--rows", "²"), "--rows is '²'; give a number of rows, or all"),
        (1.0, NAMES, ("--html", "."), "--html . is a folder; name the file to write, explain.html"),
    ],
)
def test_a_fault_is_one_line(
    value: float,
    names: list[str],
    options: tuple[str, ...],
    said: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    weights(Path("checkpoint"), value, names)
    assert main(["explain", "checkpoint", "--base", "base", *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("error: ")) == ("", 1)
    assert said in err


def test_two_checkpoints_without_weights_are_no_pair(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "other"):
        weights(place / name, names=[])
    assert main(["explain", str(place / "one"), "--base", str(place / "other")]) == 2
    assert f"{place / 'other'} has no weights" in capsys.readouterr().err


def test_a_lora_that_adds_nothing_is_in_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights(place / "checkpoint", 1.0)
    assert (
        main(["explain", str(place / "checkpoint"), "--base", str(place / "base"), "--lora", str(place / "zero")]) == 0
    )
    said = capsys.readouterr().out
    assert "BASE, plus something of rank 1 or so in all blocks" in said
    assert "zero cannot be told apart from rounding at any scale" in said
