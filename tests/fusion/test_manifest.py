"""Laws of records and the manifest: what is written is read back, what is not a record is refused by key."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

import lora_fuse
from lora_fuse.checkpoint.diffusers_layout import diffusers_files
from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.cli import main
from lora_fuse.errors import BadCheckpoint, BadSource, Rerun
from lora_fuse.fusion.manifest import build_manifest, read_manifest
from lora_fuse.fusion.plan import make_plan
from lora_fuse.hub import lock_lora
from lora_fuse.lora.inputs import LoraInput
from lora_fuse.machine.files import FileRecord
from lora_fuse.recipe.checkout import this_tool
from lora_fuse.recipe.records import Lock, Manifest, MergedFile, MergedLora, from_json, to_json
from lora_fuse.recipe.sections import Source
from tests.support import tiny
from tests.support.tiny import in_folder

MANIFEST = Manifest(
    schema=1,
    recipe="pocket",
    base=Lock(None, "pocket/model", None, None, {"a.json": FileRecord(2, "00")}),
    loras=(MergedLora("l", 0.8, "11", "l.safetensors", "a/b", None, "c" * 40),),
    scale=0.8,
    targets=3,
    files={"a.json": MergedFile(2, "00", "base"), "t/w.safetensors": MergedFile(4, "22", "fused")},
)


def test_a_manifest_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(to_json(MANIFEST))
    assert read_manifest(tmp_path / "m.json")[0] == MANIFEST
    assert '"from": "fused"' in (tmp_path / "m.json").read_text()


def test_a_record_without_a_key_is_refused_by_name() -> None:
    with pytest.raises(BadSource, match=r"m\.json is not a Manifest: at loras\.0\.sha256"):
        from_json(Manifest, to_json(MANIFEST).replace('"sha256": "11"', '"sha": "11"'), "m.json")


def test_a_missing_manifest_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(BadSource, match=r"m\.json is not there") as refused:
        read_manifest(tmp_path / "m.json")
    assert refused.value.rerun == Rerun("fuse")


@pytest.mark.parametrize(("repo_id", "path"), [(None, None), ("a/b", "p")])
def test_a_source_is_one_place(repo_id: str | None, path: str | None) -> None:
    with pytest.raises(ValidationError, match="exactly one"):
        Source(repo_id=repo_id, path=path, revision="main")


def test_a_peft_folder_is_known_by_its_weights_and_by_what_scales_them(tmp_path: Path) -> None:
    base = open_checkpoint(tiny.write_component(tmp_path / "base", tiny.weights()))
    tensors = tiny.lora_tensors("peft", alpha=None)
    tiny.write_lora(tmp_path / "loras/style/adapter_model.safetensors", tensors)
    provenances, sums = set(), set()
    for alpha in (4, 8):
        config = tmp_path / "loras/style/adapter_config.json"
        config.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": alpha}))
        lock = lock_lora(in_folder(tmp_path / "loras"), "style", previous=None)
        plan = make_plan(base, [LoraInput("style", tmp_path / "loras" / lock.lora_name, 1.0)])
        (lora,) = build_manifest(plan, {}, loras={"style": lock}).loras
        assert (lora.filename, lora.path) == ("style", str(tmp_path / "loras"))
        assert lora.sha256 == lock.files["style/adapter_model.safetensors"].sha256
        assert lora.config_sha256 == lock.files["style/adapter_config.json"].sha256
        provenances.add(plan.provenance)
        sums.add(lora.sha256)
    assert (len(provenances), len(sums)) == (2, 1)


def test_the_tool_knows_its_checkout() -> None:
    tool = this_tool()
    assert tool.git is None or len(tool.git) == 40


def test_a_pipeline_that_the_base_has_already_changes_no_file(tmp_path: Path) -> None:
    base = tiny.write_pipeline(tmp_path / "base", tiny.weights())
    assert diffusers_files(base, pipeline="QwenImageEditPipeline", scheduler={}) == {}
    assert diffusers_files(base, pipeline="QwenImageEditPlusPipeline", scheduler={}).keys() == {"model_index.json"}


def test_a_scheduler_of_another_class_is_in_the_index_too_and_verified_there(base: Path, tmp_path: Path) -> None:
    scheduler = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 5.0}
    lora = LoraInput("l", tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors()), 1.0)
    merged = tmp_path / "merged"
    lora_fuse.fuse(lora_fuse.plan(base, [lora]), merged, scheduler=scheduler)
    index = json.loads((merged / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "UniPCMultistepScheduler"]
    assert json.loads((merged / "scheduler/scheduler_config.json").read_text()) == scheduler
    assert lora_fuse.verify(merged, base, [lora], scheduler=scheduler).passed
    assert not lora_fuse.verify(merged, base, [lora], scheduler=scheduler | {"_class_name": "LCMScheduler"}).passed
    for kind, code in (("UniPCMultistepScheduler", 0), ("UniPC", 2)):
        (tmp_path / "s.json").write_text(json.dumps(scheduler | {"_class_name": kind, "_diffusers_version": "0"}))
        given = [base, tmp_path / kind, "--lora", lora.path, "--scale", "1.0", "--scheduler", tmp_path / "s.json"]
        assert main(["fuse", *map(str, given)]) == code
        assert (tmp_path / kind).exists() == (code == 0)
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "UniPCMultistepScheduler" / file).read_bytes() == (merged / file).read_bytes()
    (merged / "model_index.json").write_bytes((base / "model_index.json").read_bytes())
    (problem,) = lora_fuse.verify(merged, base, [lora], scheduler=scheduler).problems
    assert "model_index.json: scheduler is" in problem


def test_a_base_with_a_broken_scheduler_file_is_refused(tmp_path: Path) -> None:
    base = tiny.write_pipeline(tmp_path / "base", tiny.weights())
    (base / "scheduler/scheduler_config.json").write_text("[]")
    with pytest.raises(BadCheckpoint, match="scheduler_config"):
        diffusers_files(base, pipeline=None, scheduler={"shift": 1.0})
