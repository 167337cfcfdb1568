"""Laws of configuration: conf/ is the source, params.yaml is compiled from it, and every key is checked."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_fuse.errors import BadConfig
from lora_fuse.models import families, pair_warnings, pipelines
from lora_fuse.recipe.recipe import Recipe
from stages.config import compose, load
from tests.support.composed import recipe_of, tree_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("call", ["oc.env:HOME", "oc.decode:'1'", "oc.select:name", "now:%Y", "hydra:runtime.cwd"])
def test_a_value_calls_no_function(call: str) -> None:
    """A recipe of a pull request is text of somebody: it does not read the environment of who validates it."""
    with pytest.raises(BadConfig, match=r"Unsupported interpolation type"):
        compose([f"base.path=${{{call}}}"])
    with pytest.raises(BadConfig, match=r"Unsupported interpolation type|Error resolving interpolation"):
        compose([f"recipe=${{{call}}}"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_to_checked_parameters(recipe: str) -> None:
    params = recipe_of(f"recipe={recipe}")
    assert params.name == recipe
    call = pipelines()[params.base.pipeline]
    assert not call.guidance.doubles(params.sampling.true_cfg_scale, params.sampling.negative_prompt)
    assert params.scheduler_config.get("shift_terminal") is None
    assert all((case.frames is not None) == call.makes_clip for case in params.regress.cases.values())
    assert all((ROOT / image).is_file() for case in params.regress.cases.values() for image in case.images)


def test_every_family_has_a_recipe_and_every_figure_of_one_a_source() -> None:
    built = {recipe_of(f"recipe={recipe}").base.repo_id for recipe in RECIPES}
    for family in (family for family in families() if family.pipelines or family.name == "Wan 2.2"):
        assert built & {base.repo_id for base in family.bases}, family.name
    bases = {path.stem: path.read_text() for path in (ROOT / "conf" / "base").glob("*.yaml")}
    for recipe in RECIPES:
        text = (ROOT / "conf" / "recipe" / f"{recipe}.yaml").read_text()
        if not recipe.startswith(("pocket", "tiny_", "qwen_image_")) or recipe == "qwen_image_21_lightning_4steps":
            (base,) = re.findall(r"/base: (\w+)", text)
            for said in (text, bases[base]):
                assert re.search(r"^#.*(card|github\.com|diffusers 0\.42)", said, re.MULTILINE), (recipe, said)


def test_there_is_a_recipe_for_every_base_of_qwen_image_and_its_steps() -> None:
    built = {(one.base.repo_id, one.sampling.steps) for one in map(recipe_of, (f"recipe={name}" for name in RECIPES))}
    only_4 = {"Qwen/Qwen-Image-Edit-2511", "Qwen/Qwen-Image-2512"}
    (family,) = (family for family in families() if family.name == "Qwen-Image")
    for base in family.bases:
        assert (base.repo_id, 4) in built
        assert ((base.repo_id, 8) in built) == (base.repo_id not in only_4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_the_manual_procedure_s_pair_is_warned_about(recipe: str) -> None:
    params = recipe_of(f"recipe={recipe}")
    warnings = pair_warnings(params.base.repo_id, [(lora.repo_id, lora.filename) for lora in params.loras.values()])
    assert bool(warnings) == (recipe == "qwen_image_edit_2509_lora_on_edit")


def test_the_pipeline_of_a_recipe_is_its_family_s() -> None:
    known = {base.repo_id: base.pipeline for family in families() for base in family.bases}
    for recipe in RECIPES:
        base = recipe_of(f"recipe={recipe}").base
        assert base.repo_id is None or base.pipeline == known[base.repo_id]


def test_params_yaml_is_what_conf_composes_to() -> None:
    assert run("stages.config", "--check").returncode == 0


def test_an_edited_params_yaml_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    assert run("stages.config", "recipe=qwen_image_edit_2509_lightning_4steps").returncode == 0
    assert yaml.safe_load(Path("params.yaml").read_text())["name"] == "qwen_image_edit_2509_lightning_4steps"
    assert run("stages.config", "recipe=qwen_image_edit_2509_lightning_4steps", "--check").returncode == 0
    checked = run("stages.config", "--check")
    assert checked.returncode == 1
    assert "-name: qwen_image_edit_2509_lightning_4steps" in checked.stdout


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("recipe=nope", "recipe/nope"),
        ("fuse.scal=1", "fuse.scal"),
        ("fuse.scale=much", "fuse.scale"),
        ("fuse.scale=nan", "fuse.scale"),
        ("sampling.steps=0", "sampling.steps"),
        ("fuse.device=tpu", "fuse.device"),
        ("regress.placement=disk", "regress.placement"),
        ("regress.threads=0", "regress.threads"),
        ("regress.over_floor=nan", "regress.over_floor"),
        ("base.revision=null", "revision"),
        ("+fuse.lora_scales.other=1.0", "'other'"),
        ("base.revision=80e1234", "revision"),
    ],
)
def test_a_bad_override_is_one_line_that_names_the_key(override: str, named: str) -> None:
    recipe = ["recipe=qwen_image_edit_lightning_4steps"] if override.startswith("base") else []
    refused = run("stages.config", *recipe, override)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert refused.stderr.startswith("error: ")
    assert named in refused.stderr


@pytest.mark.parametrize(("override", "named"), [("sampling.steps=8", "8 steps"), ("sampling.sigmas=[1.0]", "got 1")])
def test_a_step_without_its_sigma_is_refused_with_both_counts(override: str, named: str) -> None:
    refused = run("stages.config", override)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "steps visit as many sigmas" in refused.stderr
    assert named in refused.stderr
    assert ("[1.0, 0.9, 0.75, 0.5]" in refused.stderr) == ("steps=" in override)


def test_blocks_are_compiled_where_parts_stay_in_their_place() -> None:
    assert load(["regress.compile=true"]).regress.compile
    with pytest.raises(BadConfig, match="compile needs placement cuda or cpu, and it is model_offload"):
        load(["regress.compile=true", "regress.placement=model_offload"])


def test_steps_are_free_where_the_sigmas_are_open() -> None:
    assert load(["sampling.steps=8", "sampling.sigmas=null"]).sampling.steps == 8
    assert load(["sampling.steps=2", "sampling.sigmas=[1.0, 0.5]"]).sampling.sigmas == [1.0, 0.5]


def changed(path: str, value: object) -> dict[str, Any]:
    tree = tree_of()
    *parents, last = path.split(".")
    at = tree
    for parent in parents:
        at = at[parent]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return tree


def test_a_scheduler_of_another_class_has_its_own_settings_and_sigmas_go_into_the_call() -> None:
    named = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    recipe = Recipe.parse(changed("scheduler", named), "params.yaml")
    assert recipe.scheduler_config == named
    assert Recipe.parse(recipe.model_dump(), "a candidate, a job") == recipe
    recipe = Recipe.parse(changed("sampling.call_sigmas", [1.0, 0.65, 0.44, 0.29]), "params.yaml")
    assert recipe.sampling.usage["call_sigmas"] == (1.0, 0.65, 0.44, 0.29)
    with pytest.raises(BadConfig, match="4 steps visit as many sigmas: got 1"):
        Recipe.parse(changed("sampling.call_sigmas", [1.0]), "params.yaml")


NO_NAMES = ["../../x", "a/b", "/x", "..", ".", ".x", "-x", "a\\b", "a b", "x\n", "\x1b[2J", "", "ä", "x" * 65]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_is_a_path_is_refused_with_the_name_and_the_rule(name: str) -> None:
    tree = tree_of()
    lora = tree["loras"]["lightning"]
    for changed_tree in (tree | {"name": name}, tree | {"loras": {name: lora}}):
        with pytest.raises(BadConfig, match="take up to 64 of A-Z a-z 0-9 ") as refused:
            Recipe.parse(changed_tree, "params.yaml")
        assert repr(name)[:70] in str(refused.value)


@pytest.mark.parametrize("name", ["pocket", "Qwen-Image-2.1", "2512_lightning", "x" * 64])
def test_a_name_that_is_one_part_of_a_path_is_a_name(name: str) -> None:
    tree = tree_of()
    recipe = Recipe.parse(tree | {"name": name, "loras": {name: tree["loras"]["lightning"]}}, "params.yaml")
    assert (recipe.name, list(recipe.loras)) == (name, [name])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("regress.golden.psnr", 3.0),
        ("verify.rows", "some"),
        ("publish.private", "yes"),
        ("fuse.scale", None),
        ("loras", {}),
        ("scheduler.shift", "x"),
        ("scheduler._class_name", "EulerScheduler"),
        ("sampling.call_sigmas", [True]),
    ],
)
def test_an_unknown_missing_or_ill_typed_key_is_named(path: str, value: object) -> None:
    with pytest.raises(BadConfig, match=path.replace(".", r"\.")):
        Recipe.parse(changed(path, value), "params.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x]\nb: [*a, *a]\n", "the alias"),
        ("a: " + "[" * 1000, "nested deeper"),
    ],
)
def test_a_recipe_out_of_bounds_is_refused_by_its_file(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/recipe/bomb.yaml").write_text(text)
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(BadConfig, match=rf"conf/recipe/bomb\.yaml .*{words}"):
        compose(["recipe=pocket"])
    with pytest.raises(BadConfig, match=rf"params\.yaml is not YAML .*{words}"):
        load()


@pytest.mark.parametrize("override", ["fuse.only=" + "[" * 500 + "]" * 500, "fuse.scale=" + "1" * 5000])
def test_an_override_out_of_bounds_is_refused(override: str) -> None:
    """One of conf/variants.yaml may be anybody's, too."""
    with pytest.raises(BadConfig, match=r"^conf/ with fuse\."):
        compose([override])


def test_references_that_double_a_value_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    links = "".join(f"  b{n}: ${{x.b{n - 1}}}${{x.b{n - 1}}}\n" for n in range(1, 40))
    (tmp_path / "conf/recipe/bomb.yaml").write_text(f"# @package _global_\nx:\n  b0: lol\n{links}")
    with pytest.raises(BadConfig, match="conf/ has 78 references"):
        compose(["recipe=bomb"])


def test_a_key_that_is_no_plain_name_is_quoted_in_the_refusal() -> None:
    tree = compose()
    tree["loras"]["bad name\n"] = tree["loras"]["lightning"] | {"filename": 7}
    with pytest.raises(BadConfig, match=r"loras\.'bad name\\n'\."):
        Recipe.parse(tree, "params.yaml")
