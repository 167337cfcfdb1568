"""Laws of the front door: README's example runs, and Python is refused what the command line is refused."""

import json
import re
from pathlib import Path

import pytest

import lora_fuse
from lora_fuse import LoraInput, fuse, plan, verify
from lora_fuse.errors import BadConfig, BadScale, NoDevice, Refused, UnmatchedTargets
from lora_fuse.fusion.manifest import read_manifest
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_pipeline(tmp_path / "BASE", tiny.weights())


@pytest.fixture
def lora(tmp_path: Path) -> LoraInput:
    return LoraInput("style", tiny.write_lora(tmp_path / "LORA.safetensors", tiny.lora_tensors()), 0.8)


@pytest.mark.usefixtures("base", "lora")
def test_the_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("### From Python")[2]
    match = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert match is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(match[1], "README.md", "exec"), {})  # noqa: S102 - it is our own
    assert capsys.readouterr().out == "4 weights changed: right\n"
    assert (tmp_path / "OUT/transformer").is_dir()
    assert read_manifest(tmp_path / "OUT.manifest.json")[0].targets == 4


def test_the_command_line_and_python_write_the_same(tmp_path: Path, base: Path, lora: LoraInput) -> None:
    from lora_fuse.cli import main

    fused = fuse(plan(base, [lora]), tmp_path / "a", scheduler={"shift": 1.0})
    (tmp_path / "s.json").write_text(json.dumps({"shift": 1.0}))
    command = ["fuse", base, tmp_path / "b", "--lora", lora.path, "--scale", "0.8", "--scheduler", tmp_path / "s.json"]
    assert main([str(argument) for argument in command]) == 0
    assert fused.manifest.files == read_manifest(tmp_path / "b.manifest.json")[0].files
    assert fused.bytes_written > 0


def test_a_wrong_scale_is_found(tmp_path: Path, base: Path, lora: LoraInput) -> None:
    fuse(plan(base, [lora]), tmp_path / "out")
    found = verify(tmp_path / "out", base, [LoraInput("style", lora.path, 0.7)])
    assert (found.passed, found.problem_count) == (False, 6)


def test_what_cannot_be_used_is_refused_and_nothing_is_written(tmp_path: Path, base: Path, lora: LoraInput) -> None:
    foreign = {name.replace("attn", "nope"): tensor for name, tensor in tiny.lora_tensors().items()}
    other = tiny.write_lora(tmp_path / "other.safetensors", foreign)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UnmatchedTargets):
        plan(base, [LoraInput("other", other, 1.0)])
    with pytest.raises(BadScale):
        plan(base, [LoraInput("style", lora.path, float("nan"))])
    with pytest.raises(NoDevice):
        fuse(plan(base, [lora]), tmp_path / "out", device="tpu")
    with pytest.raises(Refused, match="overlap"):
        fuse(plan(base, [lora]), base / "out")
    component = plan(base / "transformer", [lora])
    with pytest.raises(BadConfig, match="scheduler is for a pipeline"):
        fuse(component, tmp_path / "out", scheduler={"shift": 1.0})
    with pytest.raises(BadConfig, match="rows"):
        verify(base, base, [lora], rows=0)
    with pytest.raises(BadConfig, match="the seed is -1"):
        verify(base, base, [lora], seed=-1)
    assert sorted(tmp_path.rglob("*")) == before


def test_progress_is_silent_unless_asked_for(
    tmp_path: Path, base: Path, lora: LoraInput, capsys: pytest.CaptureFixture[str]
) -> None:
    fuse(plan(base, [lora]), tmp_path / "out")
    assert capsys.readouterr() == ("", "")


def test_an_unknown_name_is_no_part_of_the_library() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        lora_fuse.no_such_name  # type: ignore[attr-defined]  # noqa: B018


def test_a_warning_shows_foreign_text_as_its_escapes(base: Path, tmp_path: Path) -> None:
    config = base / "transformer/config.json"
    config.write_text(json.dumps({"auto_map": {"AutoModel": "evil--m.X\x1b[2J\u202e"}}, ensure_ascii=False))
    lora = tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors())
    with pytest.warns(UserWarning, match="asks|auto_map") as caught:
        fuse(plan(base, [LoraInput("l", lora, 1.0)]), tmp_path / "OUT")
    shown = str(caught[0].message)
    assert shown.isprintable()
    assert "evil--m.X" in shown
