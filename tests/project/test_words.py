"""The house's words: names that are there once, docstrings with a subject, one statement a line, thin stages."""

import ast
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("lora_fuse", "stages", "pocket", "benchmarks")
SOURCES = sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py"))
# A docstring begins with a verb or with a noun of the field.
NO_SUBJECT = ("How", "It", "That", "Those", "What", "When", "Where", "Whether", "Which", "Who", "Whose", "Why")
STATEMENTS = 25  # of a function in stages/
LONGEST = 60  # lines of a function
SAME_STEM = {"__init__", "__main__"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def subjectless(tree: ast.Module) -> list[str]:
    documented = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    texts = [ast.get_docstring(node) or "…" for node in documented]
    return [text.splitlines()[0] for text in texts if text.split()[0].strip("`,.:") in NO_SUBJECT]


def packed(tree: ast.Module) -> list[int]:
    """The lines of assignments of several values to several names, but for swaps."""
    lines = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple)
        ):
            left = sorted(map(ast.unparse, node.targets[0].elts))
            if left != sorted(map(ast.unparse, node.value.elts)):
                lines.append(node.lineno)
    return lines


def statements(function: ast.FunctionDef) -> int:
    return sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1 - bool(ast.get_docstring(function))


def fields(node: ast.ClassDef) -> tuple[str, ...]:
    annotated = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
    return tuple(sorted(target.id for target in annotated if isinstance(target, ast.Name)))


def classes() -> Iterable[tuple[Path, ast.ClassDef]]:
    for path in SOURCES:
        if name_of(path).startswith("lora_fuse/"):
            yield from ((path, node) for node in tree_of(path).body if isinstance(node, ast.ClassDef))


def long(tree: ast.Module) -> list[str]:
    return [one.name for one in functions(tree) if (one.end_lineno or 0) - one.lineno >= LONGEST]


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("offences", [subjectless, packed, long])
def test_a_docstring_has_a_subject_a_line_one_statement_and_no_function_is_long(
    offences: Callable[[ast.Module], list[Any]],
) -> None:
    assert {name_of(path): found for path in SOURCES if (found := offences(tree_of(path)))} == {}


def test_a_stage_is_counted_in_statements() -> None:
    counted = {
        f"{name_of(path)}:{one.name}": statements(one)
        for path in SOURCES
        if path.parent == ROOT / "stages"
        for one in functions(tree_of(path))
    }
    assert {name: count for name, count in counted.items() if count > STATEMENTS} == {}


def test_a_class_and_a_module_have_names_of_their_own() -> None:
    named: dict[str, list[str]] = defaultdict(list)
    for path, node in classes():
        if not node.name.startswith("_"):
            named[node.name].append(name_of(path))
    for path in SOURCES:
        if name_of(path).startswith("lora_fuse/") and path.stem not in SAME_STEM:
            named[f"{path.stem}.py"].append(name_of(path))
    assert {name: places for name, places in named.items() if len(places) > 1} == {
        "render.py": ["lora_fuse/pictures/render.py", "lora_fuse/regression/render.py"]  # published cards import it
    }


def test_no_two_value_classes_have_the_same_fields() -> None:
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path, node in classes():
        if len(fields(node)) > 1:
            alike[fields(node)].append(f"{name_of(path)}:{node.name}")
    assert [names for names in alike.values() if len(names) > 1] == []


def test_the_rules_catch_what_they_are_for() -> None:
    bad = ast.parse('"""What it is."""\na, b = 1, 2\na, b = b, a\n')
    assert (subjectless(bad), packed(bad)) == (["What it is."], [2])
    (function,) = ast.parse('def f():\n    """Do it."""\n    if x:\n        y()\n').body
    assert isinstance(function, ast.FunctionDef)
    assert statements(function) == 2


def outline(stage: dict[str, Any]) -> dict[str, Any]:
    """Command, dependencies, parameters and results of a stage; a variant has the main build's paths and keys."""

    def plain(text: str) -> str:
        text = text.replace("artifacts/bases/${item.base}", "artifacts/base")
        for own in ("variants.${key}.", "variants/${key}/", " --variant ${key}"):
            text = text.replace(own, "")
        return text

    listed = [item["variants/params.yaml"] if isinstance(item, dict) else [item] for item in stage.get("params", [])]
    params = [key for keys in listed for key in keys]
    results = [item for kind in ("outs", "metrics", "plots") for item in stage.get(kind, [])]
    cached = {plain(path): flags.get("cache", True) for item in results for path, flags in item.items()}
    deps = sorted(map(plain, stage.get("deps", [])))
    return {"cmd": plain(stage["cmd"]), "deps": deps, "params": sorted(map(plain, params)), "results": cached}


def test_the_main_build_and_a_variant_have_the_same_stages_but_for_download() -> None:
    main = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    variants = yaml.safe_load((ROOT / "variants/dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert main.keys() == variants.keys() - {"base"}
    for name in main.keys() - {"download"}:
        assert outline(variants[name]["do"]) == outline(main[name]), name
