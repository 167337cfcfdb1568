"""Laws of `conf/variants.yaml`: each mistake is one line that says what, and the compiled file stays as it was."""

import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from lora_fuse.errors import BadConfig, Rerun
from lora_fuse.machine.parsing import parse_yaml
from lora_fuse.recipe.paths import Artifacts
from stages.config.__main__ import main
from stages.config.variants import COMPILED, ENTRIES, compile_entries, load_variant, read_compiled, read_entries
from stages.run import command, next_commands

ROOT = Path(__file__).resolve().parents[2]
VARIANT = Artifacts(Path("x"), "soft", published=True)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


REFUSED = {
    "unknown recipe": ("a: {recipe: pockett}", "there is no recipe 'pockett'; did you mean pocket? there are"),
    "no recipe": ("a: {scale: 1.0}", "a: recipe: Field required"),
    "recipe of another name kind": ("a: {recipe: ../base/pocket}", "there is no recipe '../base/pocket'"),
    "name of a path": ("../a: {recipe: pocket}", "'../a' cannot name a folder"),
    "name of a DVC stage": ("a@b: {recipe: pocket}", "'a@b' cannot name a folder and a DVC stage"),
    "name with a dot": ("v1.0: {recipe: pocket}", "'v1.0' cannot name"),
    "name in capitals": ("Soft: {recipe: pocket}", "'Soft' cannot name"),
    "name that is no text": ("12: {recipe: pocket}", "12 cannot name"),
    "scale as text": ("a: {recipe: pocket, scale: much}", "a: scale: Input should be a valid number, got 'much'"),
    "scale that is not finite": ("a: {recipe: pocket, scale: .nan}", "a: scale: Input should be a finite number"),
    "unknown key": ("a: {recipe: pocket, scal: 0.8}", "a: scal: Extra inputs are not permitted, got 0.8"),
    "repository without an owner": ("a: {recipe: pocket, repo_id: b}", "a: repo_id: String should match"),
    "tag that moves": ("a: {recipe: pocket, repo_id: b/c, tag: main}", "the tag main would be taken for a branch"),
    "override of its own key": ("a: {recipe: pocket, overrides: [fuse.scale=2]}", "sets fuse.scale, which scale says"),
    "override of a section": ("a: {recipe: pocket, overrides: ['publish={tag: x}']}", "sets publish.enabled"),
    "override of nothing": ("a: {recipe: pocket, overrides: [fuse.scal=2]}", "fuse.scal"),
    "override of the wrong type": ("a: {recipe: pocket, overrides: [verify.rows=few]}", "a: verify.rows"),
    "empty file": ("", "is empty; list the variants, or write {}"),
    "only a comment": ("# later\n", "is empty; list the variants"),
    "a list": ("- pocket\n", "is a list, not a mapping"),
    "an entry that is none": ("a: pocket", "a: the top: Input should be"),
    "no YAML": ("a: {recipe", "is not YAML"),
    "a name twice": ("a: {recipe: pocket}\na: {recipe: pocket, scale: 2}", "the key a is there twice"),
    "one place for two": (
        "a: {recipe: pocket, repo_id: o/m, tag: v1}\nb: {recipe: pocket, repo_id: O/m, tag: v1}",
        "a and b would be the same on the Hub: O/m, tags v1 and v1",
    ),
    "one repository, and one of them untagged": (
        "a: {recipe: pocket, repo_id: o/m, tag: v1}\nb: {recipe: pocket, repo_id: o/m}",
        "give each a tag of its own",
    ),
    "a recipe's goldens for another model": ("pocket: {recipe: pocket, scale: 0.8}", "another fuse than the recipe"),
    "a recipe's name for another recipe": ("pocket_text: {recipe: pocket}", "artifacts/golden/pocket_text"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_mistake_is_named_and_nothing_is_compiled(kind: str) -> None:
    text, said = REFUSED[kind]
    ENTRIES.write_text(text)
    with pytest.raises(BadConfig) as refused:
        compile_entries()
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(("conf/variants.yaml", "conf/ with recipe="))


def test_a_refused_file_leaves_both_compiled_ones() -> None:
    assert main([]) == 0
    before = [Path(name).read_bytes() for name in ("params.yaml", COMPILED)]
    ENTRIES.write_text("a: {recipe: pocket, scale: much}")
    with pytest.raises(BadConfig):
        main(["fuse.scale=0.5"])
    assert [Path(name).read_bytes() for name in ("params.yaml", COMPILED)] == before


def test_what_is_shipped_is_right_and_published_nowhere() -> None:
    compiled = compile_entries()
    assert sorted(compiled["variants"]) == ["pocket", "pocket_pastel", "pocket_soft"]
    assert compiled["published"] == []
    assert len(compiled["bases"]) == 1
    assert compiled["variants"]["pocket_soft"]["fuse"]["scale"] == 0.8


def test_entries_say_where_it_goes_and_a_base_is_listed_once() -> None:
    ENTRIES.write_text(
        "a: {recipe: pocket, repo_id: o/m, tag: '1.0', private: false}\n"
        "b: {recipe: pocket, repo_id: o/m, tag: '2.0', overrides: [publish.license=mit]}\n"
        "c: {recipe: qwen_image_edit_lightning_4steps}\n"
        "d: {recipe: qwen_image_edit_lightning_8steps, overrides: [base.revision=refs/pr/1]}\n"
    )
    assert main([]) == 0
    compiled = read_compiled()
    publish = {name: load_variant(name).publish for name in "abcd"}
    assert [(one.enabled, one.tag, one.private, one.license) for one in publish.values()] == [
        (True, "1.0", False, None),
        (True, "2.0", True, "mit"),
        (False, None, True, None),
        (False, None, True, None),
    ]
    assert compiled.published == ["a", "b"]
    assert sorted(compiled.bases.values()) == ["a", "c", "d"]
    assert compiled.builds["a"].base == compiled.builds["b"].base
    assert [load_variant(name).name for name in "abcd"] == list("abcd")


def test_no_variants_at_all_are_said_with_braces() -> None:
    ENTRIES.write_text("{}")
    assert (read_entries(), compile_entries()["builds"]) == ({}, {})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--variant", "pocket_sof"], "there is no variant 'pocket_sof'; did you mean pocket_soft? there are pocket, "),
        (["--variant", "pocket_sof", "fuse.scale=1.0"], "there is no variant 'pocket_sof'; did you mean pocket_soft?"),
        (["--variant"], "--variant takes one name"),
        (["--variant=a", "--variant", "b"], "--variant takes one name"),
    ],
)
def test_an_unknown_variant_is_one_line_and_exit_code_2(project: Path, arguments: list[str], said: str) -> None:
    (project / "variants").mkdir()
    shutil.copyfile(ROOT / COMPILED, project / COMPILED)
    command = [sys.executable, "-m", "stages.gate", *arguments]
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines()), done.stdout) == (2, 1, "")
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert not (project / "artifacts").exists()


@pytest.mark.parametrize("text", ["", "variants: {}", "variants: ["])
def test_an_edited_compiled_file_is_refused_with_the_way_out(text: str) -> None:
    COMPILED.parent.mkdir()
    COMPILED.write_text(text)
    with pytest.raises(BadConfig, match=r"variants/params\.yaml.*write it anew: python -m stages\.config"):
        read_compiled()


def test_a_compiled_variant_that_is_a_path_is_refused() -> None:
    assert main([]) == 0
    tree = parse_yaml(COMPILED.read_text())
    tree["variants"]["../../x"] = deepcopy(tree["variants"]["pocket"])
    COMPILED.write_text(yaml.safe_dump(tree))
    with pytest.raises(BadConfig, match=r"variants/params\.yaml.*'\.\./\.\./x' cannot name a file.*python -m stages"):
        load_variant("../../x")


@pytest.mark.parametrize(
    ("step", "main", "own"),
    [
        (Rerun("fuse"), "dvc repro fuse", "dvc repro variants/dvc.yaml:fuse@soft"),
        (
            Rerun("verify regress", force=True),
            "dvc repro -f verify regress",
            "dvc repro -f variants/dvc.yaml:verify@soft variants/dvc.yaml:regress@soft",
        ),
        (Rerun("build"), "dvc repro", "dvc repro variants/dvc.yaml:gate@soft"),
        (Rerun("publish"), "dvc repro publish/dvc.yaml", "dvc repro publish/dvc.yaml:variant@soft"),
        (
            Rerun("approve"),
            'python -m stages.approve --reason "…"',
            'python -m stages.approve --variant soft --reason "…"',
        ),
        (
            Rerun("verify", settings=("recipe=soft", "verify.rows=all")),
            "python -m stages.verify recipe=soft verify.rows=all",
            "python -m stages.verify --variant soft verify.rows=all",
        ),
        (Rerun("config"), "python -m stages.config", "python -m stages.config"),
    ],
)
def test_a_step_s_command_is_that_of_the_build_that_it_is_about(step: Rerun, main: str, own: str) -> None:
    assert command(step, VARIANT) == own
    assert command(step) == main


def test_a_refusal_with_a_way_out_ends_with_its_command() -> None:
    with pytest.raises(BadConfig, match=r"^no; next: dvc repro variants/dvc\.yaml:fuse@soft$"), next_commands(VARIANT):
        raise BadConfig("no", rerun=Rerun("fuse"))
    with pytest.raises(BadConfig, match=r"^no$"), next_commands(VARIANT):
        raise BadConfig("no")
