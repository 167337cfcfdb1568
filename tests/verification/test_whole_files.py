"""Laws of the files beside the weights: OUT has what BASE has and nothing else, and what is generated is made again.

The merge here is made by copying and by numpy, so that no law rests on what the engine happens to take.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_fuse.checkpoint import repository_files
from lora_fuse.cli import main
from lora_fuse.errors import BadCheckpoint
from lora_fuse.lora.inputs import LoraInput
from lora_fuse.recipe.records import Manifest, MergedFile
from lora_fuse.verification.rederivation import Expectation, Verification, verify_merge
from lora_fuse.verification.whole_files import check_files
from tests.support import tiny

SCHEDULER = {"shift": 1.0, "shift_terminal": None}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LEFT = (
    "README.md",
    "vae/diffusion_pytorch_model.bin",
    ".gitattributes",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
)
TAKEN = {
    "LICENSE": "Apache",
    "NOTICE": "of somebody",
    "tokenizer/vocab.json": "{}",
    "tokenizer/merges.txt": "a b",
    "tokenizer/qwen.tiktoken": "YQ== 0",
    "tokenizer/chat_template.jinja": "{{ x }}",
    "vae/config.json": "{}",
}


class Repository:
    """A pipeline whose transformer is one file with one target, and a right merge of it."""

    def __init__(self, folder: Path) -> None:
        self.base = tiny.write_pipeline(folder / "base", {}, 1)
        weight = np.arange(64, dtype=np.float32).reshape(16, 4)
        save_file({"x.weight": weight}, self.base / WEIGHTS, metadata={"format": "pt"})
        save_file({"x.weight": weight}, self.base / LEFT[3], metadata={"format": "pt"})
        for name, text in {**TAKEN, ".gitattributes": "x"}.items():
            (self.base / name).parent.mkdir(exist_ok=True)
            (self.base / name).write_text(text)
        names = {name: ["diffusers", "X"] for name in ("transformer", "vae", "tokenizer")}
        index = json.loads((self.base / "model_index.json").read_text()) | names | {"image_encoder": [None, None]}
        (self.base / "model_index.json").write_text(json.dumps(index))
        lora = {"x.lora_A.weight": np.ones((1, 4), np.float32), "x.lora_B.weight": np.ones((16, 1), np.float32)}
        self.loras = [LoraInput("l", tiny.write_lora(folder / "l.safetensors", lora), 1.0)]
        self.out = Path(
            shutil.copytree(self.base, folder / "out", ignore=lambda *_: {Path(name).name for name in LEFT})
        )
        save_file({"x.weight": weight + 1}, self.out / WEIGHTS, metadata={"format": "pt", "lora_fuse": "{}"})

    def verify(self, expected: Expectation | None = None) -> Verification:
        return verify_merge(
            self.out, self.base, self.loras, component="transformer", rows=4, expected=expected or Expectation()
        )

    def generate(self, **changes: object) -> Expectation:
        """Give the merge a class and a scheduler of its own, with `changes` to the scheduler that nobody asked for."""
        old = json.loads((self.base / "scheduler/scheduler_config.json").read_text())
        made = {"_class_name": old["_class_name"], **SCHEDULER, **changes}
        index = json.loads((self.base / "model_index.json").read_text()) | {"_class_name": "Other"}
        (self.out / "scheduler/scheduler_config.json").write_text(json.dumps(made))
        (self.out / "model_index.json").write_text(json.dumps(index))
        generated = frozenset({"model_index.json", "scheduler/scheduler_config.json"})
        return Expectation("Other", SCHEDULER, generated=generated)


@pytest.fixture
def made(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def test_a_right_merge_passes_without_what_no_library_loads(made: Repository) -> None:
    found = made.verify()
    assert found.problems == []
    assert found.files_untouched == len(TAKEN) + 4  # index, scheduler, transformer's config, VAE
    assert made.verify(made.generate()).problems == []


MISSING = [
    *TAKEN,
    "transformer/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
]


@pytest.mark.parametrize("name", MISSING)
def test_a_file_that_the_merge_lacks_is_found(made: Repository, name: str) -> None:
    (made.out / name).unlink()
    assert made.verify().problems[0] == f"{name} is in the base and not in {made.out}"


@pytest.mark.parametrize("component", ["vae", "tokenizer", "scheduler"])
def test_a_component_that_the_index_names_is_there(made: Repository, component: str) -> None:
    shutil.rmtree(made.out / component)
    problems = made.verify().problems
    assert f"model_index.json names {component}, and {made.out} has no such folder" in problems
    assert any(text.startswith(f"{component}/") and "is in the base and not in" in text for text in problems)
    shutil.rmtree(made.base / component)  # nor does a base without it make it right
    assert any(f"names {component}" in text for text in made.verify().problems)


def test_a_component_behind_a_link_counts(made: Repository, tmp_path: Path) -> None:
    (made.base / "vae").rename(tmp_path / "elsewhere")
    (made.base / "vae").symlink_to(tmp_path / "elsewhere")
    assert made.verify().problems == []
    shutil.rmtree(made.out / "vae")
    assert not made.verify().passed


def test_a_component_s_index_of_shards_is_there(tmp_path: Path) -> None:
    base = tiny.write_pipeline(tmp_path / "base", tiny.weights())
    left = shutil.ignore_patterns("README.md", "*.bin")
    out = Path(shutil.copytree(base, tmp_path / "out", ignore=left))
    lora = [LoraInput("l", tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors()), 0.0)]
    expected = Expectation()
    assert verify_merge(out, base, lora, component="transformer", rows=1, expected=expected).problems == []
    name = "transformer/diffusion_pytorch_model.safetensors.index.json"
    (out / name).unlink()
    found = verify_merge(out, base, lora, component="transformer", rows=1, expected=expected)
    assert f"{name} is in the base and not in {out}" in found.problems


EXTRA = {
    "run.py": "is not in the base and no recipe asks for it",
    "vae/more.json": "is not in the base and no recipe asks for it",
    ".hidden": "is not in the base and no recipe asks for it",
    LEFT[3]: "holds weights that were not fused",
    "x.safetensors": "holds weights that were not fused",
    "transformer/model.safetensors": "holds weights that were not fused",
}


@pytest.mark.parametrize("name", EXTRA)
def test_a_file_that_only_the_merge_has_is_found(made: Repository, name: str) -> None:
    shutil.copy(made.base / LEFT[3], made.out / name)
    assert f"{name} {EXTRA[name]}" in made.verify().problems


def test_by_a_lock_every_file_of_it_is_taken_and_no_other(made: Repository) -> None:
    taken = frozenset(path.relative_to(made.out).as_posix() for path in made.out.rglob("*") if path.is_file())
    assert made.verify(Expectation(base_files=taken)).problems == []
    without = made.verify(Expectation(base_files=taken - {"LICENSE"}))
    assert without.problems == ["LICENSE is not in the base and no recipe asks for it"]
    (made.out / "NOTICE").unlink()
    assert made.verify(Expectation(base_files=taken - {"NOTICE"})).problems == []
    assert made.verify(Expectation(base_files=taken)).problems == [f"NOTICE is in the base and not in {made.out}"]


@pytest.mark.parametrize("lost", ["LICENSE", "tokenizer/vocab.json", "vae/diffusion_pytorch_model.safetensors"])
def test_what_is_needed_is_no_matter_of_the_table_that_the_engine_goes_by(
    made: Repository, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = repository_files.sort_folder(made.base, "transformer")
    others = tuple(name for name in right.others if name != lost)
    wrong = replace(right, others=others, left={**right.left, lost: "by mistake"})
    monkeypatch.setattr(repository_files, "sort_folder", lambda *_: wrong)
    (made.out / lost).unlink()
    assert any(text.startswith(lost.partition("/diff")[0]) for text in made.verify().problems)


def _without(made: Repository, component: str) -> Expectation:
    expected = made.generate()
    path = made.out / "model_index.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != component}))
    return expected


def _broken(made: Repository) -> Expectation:
    expected = made.generate()
    (made.out / "scheduler/scheduler_config.json").write_text("{")
    return expected


def _unasked(_: Repository) -> Expectation:
    return Expectation(generated=frozenset({"vae/config.json"}))


def _kept(made: Repository) -> Expectation:
    expected = made.generate()
    shutil.copy(made.base / "model_index.json", made.out)
    return expected


WRONG: dict[str, tuple[Callable[[Repository], Expectation], str]] = {
    "a setting too many": (lambda made: made.generate(extra=1), "extra is 1, base and recipe say not there"),
    "a setting of another type": (lambda made: made.generate(shift=1), "shift is 1, base and recipe say 1.0"),
    "another class": (lambda made: made.generate(_class_name="EulerDiscreteScheduler"), "_class_name is"),
    "the base's own": (_kept, 'base and recipe say "Other"'),
    "a component that the index lost": (lambda made: _without(made, "vae"), "vae is not there, base and recipe say"),
    "no JSON": (_broken, "is not readable JSON"),
    "called generated, and asked for by nobody": (_unasked, "vae/config.json is called generated"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_generated_file_is_made_again_and_compared_whole(made: Repository, name: str) -> None:
    make, words = WRONG[name]
    expected = make(made)
    assert any(words in text for text in made.verify(expected).problems)


def test_a_generated_file_is_looked_at_also_where_it_is_said_to_be_beside_the_merge(made: Repository) -> None:
    expected = made.generate(shift=7.0)
    beside = frozenset({"scheduler/scheduler_config.json", "model_index.json", "card.md"})
    (made.out / "card.md").write_text("a card")
    assert made.verify(Expectation("Other", SCHEDULER, beside)).problem_count == 1
    assert made.verify(expected).problem_count == 2


def test_a_header_that_lost_an_entry_is_found(made: Repository) -> None:
    """Transformers loads no file whose header does not say its format."""
    tensors = load_file(made.out / WEIGHTS)
    save_file(tensors, made.out / WEIGHTS, metadata={"lora_fuse": "{}"})
    assert made.verify().problems == [f"{Path(WEIGHTS).name}: its header says format None, the base's 'pt'"]
    save_file(tensors, made.out / WEIGHTS, metadata={"format": "pt", "note": "of another day"})
    assert made.verify().problems == []


def test_a_file_that_broke_off_is_no_checkpoint(made: Repository) -> None:
    (made.out / WEIGHTS).write_bytes((made.out / WEIGHTS).read_bytes()[:-4])
    with pytest.raises(BadCheckpoint, match="cannot be opened as safetensors"):
        made.verify()


def test_what_is_no_file_is_no_checkpoint(made: Repository) -> None:
    (made.out / WEIGHTS).unlink()
    os.mkfifo(made.out / WEIGHTS)
    with pytest.raises(BadCheckpoint, match="it is a named pipe, not a regular file"):
        made.verify()


def test_what_cannot_be_compared_is_refused_in_one_line(
    made: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = made.loras[0].path
    for merged, base in ((tmp_path / "nowhere", made.base), (made.out, tmp_path / "nowhere"), (lora, made.base)):
        assert main(["verify", str(merged), str(base), "--lora", str(lora)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")


def test_a_link_to_nothing_is_no_file(made: Repository) -> None:
    (made.out / "vae/config.json").unlink()
    (made.out / "vae/config.json").symlink_to("/nowhere")
    assert made.verify().problems == ["vae/config.json differs from the base's"]


def test_a_file_that_the_manifest_has_otherwise_is_found(tmp_path: Path) -> None:
    """One that it has and the folder lacks, one too many, and one of another size."""
    listed = {"a.json": MergedFile(2, "00", "base"), "t/w.safetensors": MergedFile(4, "22", "fused")}
    manifest = Manifest(1, "pocket", None, (), 0.8, targets=3, files=listed)
    (tmp_path / "a.json").write_text("{} ")
    (tmp_path / "b.json").write_text("{}")
    problems = check_files(manifest, tmp_path)
    assert [problem.split()[0] for problem in problems] == ["t/w.safetensors", "b.json", "a.json"]
