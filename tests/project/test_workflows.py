"""Laws of CI: the workflows are what GitHub and GitLab read, pass an audit, and name only commands that there are."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
GITLAB = ROOT / "docs" / "gitlab-ci.yml"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
ACTIONS = sorted((GITHUB / "actions").glob("*/action.yml"))
PROGRAMS = Path(sysconfig.get_path("scripts"))


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAMS / program, *map(str, arguments)], capture_output=True, text=True, check=False)


def audit(folder: Path) -> subprocess.CompletedProcess[str]:
    return run("zizmor", "--offline", "--pedantic", "--strict-collection", "--no-progress", folder)


def test_the_audit_finds_nothing() -> None:
    done = audit(GITHUB)
    assert done.returncode == 0, done.stdout
    assert all(f"completed {path}" in done.stderr for path in [*WORKFLOWS, *ACTIONS])


def copied(tmp_path: Path, name: str, old: str, new: str) -> Path:
    """The folder `.github`, with one change in one of its files."""
    folder = tmp_path / ".github"
    shutil.copytree(GITHUB, folder)
    path = folder / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return folder


SHA = re.search(r"actions/checkout@([0-9a-f]{40} # v\S+)", WORKFLOWS[0].read_text(encoding="utf-8"))
BAD = {
    "unpinned-uses": ("workflows/validate.yml", SHA[1] if SHA else "", "v7"),
    "template-injection": ("workflows/validate.yml", '${LORA:+"$LORA"}', "${{ inputs.lora }}"),
    "artipacked": ("workflows/publish.yml", "        with:\n          persist-credentials: false\n", ""),
    "excessive-permissions": ("workflows/checks.yml", "permissions: {}", "permissions: write-all"),
    "dangerous-triggers": ("workflows/checks.yml", "pull_request:", "pull_request_target:"),
}


@pytest.mark.parametrize("finding", BAD)
def test_the_audit_finds(finding: str, tmp_path: Path) -> None:
    done = audit(copied(tmp_path, *BAD[finding]))
    assert done.returncode > 0
    assert f"[{finding}]" in done.stdout


FILES = {
    "vendor.github-workflows": WORKFLOWS,
    "custom.github-workflows-require-timeout": WORKFLOWS,
    "vendor.github-actions": ACTIONS,
    "vendor.gitlab-ci": [GITLAB],
}
BROKEN = {
    "vendor.github-workflows": [
        (WORKFLOWS[0], "timeout-minutes:", "timeout-minute:"),
        (WORKFLOWS[-1], "cancel-in-progress:", "cancel:"),
        (WORKFLOWS[0], "runs-on:", "run-on:"),
    ],
    "custom.github-workflows-require-timeout": [(WORKFLOWS[1], "    timeout-minutes: 480\n", "")],
    "vendor.github-actions": [(ACTIONS[0], "using: composite", "with: composite")],
    "vendor.gitlab-ci": [
        (GITLAB, "exit_codes: [4]", "exit_code: [4]"),
        (GITLAB, "stage: validate", "stages: validate"),
        (GITLAB, "when: manual", "when: by-hand"),
    ],
}


@pytest.mark.parametrize("schema", BROKEN)
def test_the_files_are_of_their_schema_and_broken_ones_are_not(schema: str, tmp_path: Path) -> None:
    """All in one call: reading a schema takes a second."""
    files, broken = FILES[schema], []
    for number, (path, old, new) in enumerate(BROKEN[schema]):
        text = path.read_text(encoding="utf-8")
        assert old in text
        broken.append(tmp_path / f"{number}.yml")
        broken[-1].write_text(text.replace(old, new, 1), encoding="utf-8")
    reading = ["--data-transform", "gitlab-ci"] if schema.endswith("gitlab-ci") else []
    done = run("check-jsonschema", "-o", "json", "--builtin-schema", schema, *reading, *files, *broken)
    found = json.loads(done.stdout)
    assert {error["filename"] for error in found["errors"]} == set(map(str, broken))
    assert not found["parse_errors"]
    assert done.returncode == 1


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def scripts() -> Iterator[tuple[str, str]]:
    """Where each shell script is, and its text."""
    for path in WORKFLOWS:
        for job in read(path)["jobs"].values():
            yield from ((f"{path.name}: {step['name']}", step["run"]) for step in job["steps"] if "run" in step)
    for path in ACTIONS:
        steps = read(path)["runs"]["steps"]
        yield from ((f"{path.parent.name}: {step['name']}", step["run"]) for step in steps if "run" in step)
    for name, job in read(GITLAB).items():
        if isinstance(job, dict):
            lines = [*job.get("before_script", []), *job.get("script", [])]
            yield from [(f"{GITLAB.name}: {name}", "\n".join(lines))] if lines else []


SCRIPTS = dict(scripts())
MODULES = sorted(set(re.findall(r"python -m ([\w.]+)", "\n".join(SCRIPTS.values()))) - {"pip"})
TARGETS = sorted(set(re.findall(r"\bmake (\w+)", "\n".join(SCRIPTS.values()))))


def test_only_the_step_that_publishes_has_a_secret() -> None:
    texts = [path.read_text(encoding="utf-8") for path in [*WORKFLOWS, *ACTIONS]]
    assert sum(text.count("secrets.") for text in texts) == 1
    job = read(GITHUB / "workflows" / "publish.yml")["jobs"]["publish"]
    (step,) = (step for step in job["steps"] if "secrets." in str(step))
    assert (job["environment"], step["name"], step["env"]) == (
        "publish",
        "Publish",
        {"HF_TOKEN": "${{ secrets.HF_TOKEN }}"},
    )


def test_only_the_last_command_of_gitlab_s_job_has_the_token(tmp_path: Path) -> None:
    """Every program of the job is one that says what it has."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    for name in ("make", "python", "pip", "dvc"):
        (tmp_path / name).write_text('#!/bin/sh\necho "${HF_TOKEN:-none}"\n', encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "git").write_text('#!/bin/sh\necho "${CI_COMMIT_SHA:-none}" "${HF_TOKEN:-none}"\n', encoding="utf-8")
    (tmp_path / "git").chmod(0o755)
    jobs = read(GITLAB)
    assert "environment" not in jobs["build"]
    lines = [*jobs["publish"]["before_script"], *jobs["publish"]["script"]]
    lines[1] = lines[1].replace('$CI_COMMIT_SHA"', '$CI_COMMIT_SHA none"')
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HF_TOKEN": "hf_secret", "CI_COMMIT_SHA": "5" * 40}
    shell = ["sh", "-ec", "\n".join(lines)]
    done = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["hf_secret"]
    assert not re.search(r"make|pip |python", "\n".join(lines))


def test_another_commit_than_the_tag_s_is_not_published(tmp_path: Path) -> None:
    lines = read(GITLAB)["publish"]["script"]
    env = {"PATH": "/usr/bin:/bin", "CI_COMMIT_SHA": "5" * 40}
    shell = ["sh", "-ec", lines[0]]
    done = subprocess.run(shell, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("error: this folder holds another commit")


def test_validating_and_publishing_share_no_runner_and_no_cache() -> None:
    of_github = {
        name: read(GITHUB / f"workflows/{name}.yml")["jobs"][name]["runs-on"] for name in ("validate", "publish")
    }
    assert {name: labels[-1] for name, labels in of_github.items()} == {
        "validate": "gpu-validate",
        "publish": "gpu-publish",
    }
    jobs = read(GITLAB)
    runners = {}
    for name in ("validate", "build", "publish"):
        kinds = [name]
        while "extends" in jobs[kinds[-1]]:
            kinds.append(jobs[kinds[-1]]["extends"])
        variables: dict[str, str] = {}
        for kind in reversed(kinds):
            variables |= jobs[kind].get("variables", {})
        assert all("$RUNNER/" in variables[cache] for cache in variables if cache.endswith(("_DIR", "_HOME")))
        runners[name] = variables["RUNNER"]
    assert jobs[".gpu"]["tags"] == ["$RUNNER"]
    assert runners == {"validate": "gpu-validate", "build": "gpu-publish", "publish": "gpu-publish"}


@pytest.mark.parametrize(
    ("changed", "owned"),
    [
        (["README.md", "lora_fuse/cli.py", "docs/ci.md"], []),
        (["artifacts/golden/pocket/key/a b.json", "README.md"], ["artifacts/golden/pocket/key/a b.json"]),
        (["conf/regress/_pocket.yaml", "dvc.lock"], ["conf/regress/_pocket.yaml", "dvc.lock"]),
        ([".github/workflows/x.yml", "docs/CODEOWNERS"], [".github/workflows/x.yml", "docs/CODEOWNERS"]),
    ],
)
def test_a_change_of_what_decides_is_named(changed: list[str], owned: list[str], repository: Path) -> None:
    """Also where the branch is behind: what others changed meanwhile is none of it."""
    (repository / "docs").mkdir(exist_ok=True)
    shutil.copy(ROOT / "docs" / "CODEOWNERS", repository / "docs")
    commit(repository, "owners")
    git(repository, "switch", "-q", "-c", "asked")
    for name in changed:
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        with (repository / name).open("a", encoding="utf-8") as file:
            file.write("# changed\n")
    commit(repository, "asked")
    git(repository, "switch", "-q", "branch")
    (repository / "params.yaml").write_text("x", encoding="utf-8")
    commit(repository, "meanwhile")
    git(repository, "switch", "-q", "asked")
    command = [str(ROOT / ".ci" / "owned"), "branch"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == owned


def test_each_line_of_owners_is_of_something_that_is_here() -> None:
    lines = (ROOT / "docs" / "CODEOWNERS").read_text(encoding="utf-8").splitlines()
    paths = [line.split()[0] for line in lines if not line.startswith("#")]
    assert [path for path in paths if not (ROOT / path[1:]).exists()] == [
        "/.gitlab-ci.yml"
    ]  # docs/gitlab-ci.yml's place


def test_only_pushed_code_runs_on_a_machine_of_one_s_own() -> None:
    for path in WORKFLOWS:
        workflow = read(path)
        events = workflow[True]  # YAML 1.1 reads `on` as true
        own = any("self-hosted" in job["runs-on"] for job in workflow["jobs"].values())
        assert not own or set(events) <= {"push", "workflow_dispatch"}, path.name
        assert workflow["permissions"] == {}
        assert all(job["permissions"] == {"contents": "read"} for job in workflow["jobs"].values())


@pytest.mark.parametrize("place", SCRIPTS)
def test_a_script_is_a_shell_s(place: str) -> None:
    done = subprocess.run(["bash", "-n"], input=SCRIPTS[place], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_there_are_commands_to_look_at() -> None:
    assert {"check", "repro", "setup", "test"} <= set(TARGETS)
    assert {"stages.config", "stages.summary", "stages.validate"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_that_is_run_is_there(module: str) -> None:
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@pytest.mark.parametrize("target", [*TARGETS, "validate"])
def test_a_target_that_is_made_is_there(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert f"make {target}" in makefile.partition("$(READY): ")[0], "not in make help"


def test_github_gitlab_and_make_validate_alike() -> None:
    command = re.compile(r"python -m stages\.validate .*\$\{SCALE:\+--scale \"\$SCALE\"\}")
    made = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$$", "$")
    texts = [made, SCRIPTS["validate.yml: Validate"], SCRIPTS["gitlab-ci.yml: validate"]]
    assert len({found.group() if (found := command.search(text)) else text for text in texts}) == 1


@pytest.mark.parametrize(("code", "job"), [(0, 0), (1, 1), (2, 2), (4, 0), (137, 137)])
def test_a_job_is_as_good_as_the_validation_s_exit_code(code: int, job: int, tmp_path: Path) -> None:
    """The workflow's own step, with a program in the place of Python that gets the arguments and ends with a code."""
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f'python() {{ printf "<%s>" "$@"; return {code}; }}\n', encoding="utf-8")
    step = tmp_path / "step.sh"
    step.write_text(SCRIPTS["validate.yml: Validate"], encoding="utf-8")
    env = {"PATH": os.environ["PATH"], "LORA": "a/b@main:c $(d).safetensors", "RECIPE": "", "SCALE": "0.8"}
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(step)]
    done = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == job
    assert done.stdout.startswith("<-m><stages.validate><a/b@main:c $(d).safetensors><--scale><0.8>")
    assert ("::warning" in done.stdout) == (code == 4)


def test_a_tag_that_would_publish_nothing_is_refused(tmp_path: Path) -> None:
    """The workflow's own step, on the configuration that is here: publishing is off."""
    step = SCRIPTS["publish.yml: Is there anything to publish?"].replace(". .venv/bin/activate", "")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step]
    done = subprocess.run(shell, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "::error::this tag would publish nothing" in done.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A branch of three commits: recipe `a`, the shared configuration, and recipe `b` with a file that is none."""
    commits = [["README"], ["conf/recipe/a.yaml"], ["conf/base/x.yaml"], ["conf/recipe/b.yaml", "docs/x.md"]]
    git(tmp_path, "init", "-q", "-b", "main")
    for number, names in enumerate(commits):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x", encoding="utf-8")
        commit(tmp_path, str(number))
        if number == 0:
            git(tmp_path, "switch", "-q", "-c", "branch")
    return tmp_path


def commit(folder: Path, words: str) -> None:
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "-m", words)


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("since", "names"),
    [
        ("HEAD~1", '["b"]'),
        ("HEAD~2", '["b",""]'),
        ("HEAD~3", '["a","b",""]'),
        ("0" * 40, '["a","b",""]'),  # a new branch: what it has that main has not
        ("HEAD", '[""]'),
    ],
)
def test_the_recipes_of_a_push(since: str, names: str, repository: Path) -> None:
    command = [str(ROOT / ".ci" / "recipes"), since, "main"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == names


def test_a_recipe_that_was_removed_is_not_validated(repository: Path) -> None:
    (repository / "conf/recipe/a.yaml").unlink()
    commit(repository, "without a")
    command = [str(ROOT / ".ci" / "recipes"), "HEAD~1", "main"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[""]'
