"""What explain and extract say of pipelines on a Hub: the same as of copies here, though nothing of them is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from lora_fuse import LoraInput, fuse, plan
from lora_fuse.cli import main
from tests.hub_server import Fault, LoopbackHub
from tests.support import merges, tiny

STORED = "GET /_lfs/"


class Place:
    """A base and a merge of it, here and on the Hub, and the LoRA."""

    def __init__(self, root: Path, hub: LoopbackHub) -> None:
        self.hub = hub
        component = merges.write_base(root / "weights")
        self.base = tiny.write_pipeline(root / "base", {})
        for file in component.iterdir():
            file.replace(self.base / "transformer" / file.name)
        self.lora = merges.write_lora(root / "l.safetensors")
        self.merged = root / "merged"
        with pytest.warns(UserWarning, match="no alpha"):
            fuse(plan(self.base, [LoraInput("l", self.lora, 0.5)]), self.merged, untouched="copy")
        self.on_hub = [self._push(name, folder) for name, folder in (("merge", self.merged), ("base", self.base))]

    def _push(self, name: str, folder: Path) -> str:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return f"hf://alice/{name}@{self.hub.push(f'alice/{name}', files).oid}"

    @property
    def here(self) -> list[str]:
        return [str(self.merged), str(self.base)]

    @property
    def weights(self) -> list[Path]:
        return [path for side in (self.merged, self.base) for path in side.rglob("*.safetensors")]

    def fetched(self, since: int = 0) -> int:
        return sum(call.sent for call in self.hub.log[since:] if call.line.startswith(STORED))


@pytest.fixture
def place(tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(merges, "SHARDS", 2)
    return Place(tmp_path, hub)


def answer(capsys: pytest.CaptureFixture[str], command: str, checkpoint: str, base: str, *more: str) -> Any:
    capsys.readouterr()
    assert main([command, checkpoint, "--base", base, *more, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_explain_says_the_same_of_what_lies_on_a_hub_and_reads_what_it_compares(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--lora", str(place.lora), "--rows", "8")
    expected = answer(capsys, "explain", *place.here, *given)
    assert expected["verdict"] == "exactly BASE + l at 0.5 (rounded once)"
    place.hub.faults.append(Fault(STORED, drop_after=10_000, skip=20, times=2))
    assert answer(capsys, "explain", place.here[0], place.on_hub[1], *given) == expected
    before = len(place.hub.log)
    assert answer(capsys, "explain", *place.on_hub, *given) == expected
    whole = sum(path.stat().st_size for path in place.weights)
    assert 0 < place.fetched(before) < 0.6 * whole  # scales are found in a million values, as ever
    assert not [path for path in (tmp_path / "hf-home").rglob("*.safetensors") if path.stat().st_size > 1 << 16]


def test_extract_makes_the_same_lora_of_what_lies_on_a_hub_and_names_it(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    for number, sides in enumerate((place.here, place.on_hub)):
        out = tmp_path / f"{number}.safetensors"
        answer(capsys, "extract", *sides, "--rank", "8", "-o", str(out))
        made.append({name: values.tobytes() for name, values in load_file(out).items()})
    assert made[0] == made[1]
    assert place.on_hub[1].removeprefix("hf://").encode() in out.read_bytes()[:100_000]


def test_what_a_hub_has_not_is_one_line_and_leaves_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    merge, base = place.on_hub
    wrong = {base: "are one place", "hf://alice/none@main": "alice/none", "hf://x": "hf://owner/name@"}
    for command in (["explain"], ["extract", "--rank", "4", "-o", "out.safetensors"]):
        for checkpoint, said in wrong.items():
            capsys.readouterr()
            assert main([command[0], checkpoint, "--base", base, *command[1:]]) == 2
            (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert said in line
    place.hub.faults.append(Fault(STORED, times=-1, status=404))
    assert main([command[0], merge, "--base", base, *command[1:]]) == 2
    assert not list(tmp_path.glob("*out.safetensors*"))
