"""An engine that is made wrong on purpose, in each way in which one was: it ends in exit 0, and `verify` in 1."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_fuse.checkpoint import diffusers_layout, repository_files
from lora_fuse.cli import main
from lora_fuse.fusion import job
from lora_fuse.lora import key_parser, lora_file, scaling
from lora_fuse.lora.header_entries import HeaderEntries
from lora_fuse.lora.scaling import ModuleScale
from tests.support import tiny

Patch = Callable[[pytest.MonkeyPatch], None]
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def overlooks_the_header(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lora_file, "read_entries", lambda *_: HeaderEntries())


def overlooks_the_configuration(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lora_file, "parse_adapter_config", lambda *_: [])


def overlooks_patterns(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scaling.StatedScale, "alpha_of", lambda self, _: self.alpha)


def overlooks_every_alpha(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(key_parser, "scale_of", lambda _, rank, *__: ModuleScale(float(rank), 1.0, "nowhere"))


# What the file says, and the engine that does not read it.
LORAS: dict[str, tuple[dict[str, str], dict[str, Any] | None, Patch]] = {
    "alpha in the header": ({"alpha": "8"}, None, overlooks_the_header),
    "rsLoRA in the header": (
        {
            "lora_adapter_metadata": json.dumps(
                {f"transformer.{key}": value for key, value in {**CONFIG, "use_rslora": True}.items()}
            )
        },
        None,
        overlooks_the_header,
    ),
    "kohya's alpha": ({"ss_network_alpha": "8", "ss_network_dim": "4"}, None, overlooks_the_header),
    "alpha beside the file": ({}, CONFIG, overlooks_the_configuration),
    "rsLoRA beside the file": ({}, CONFIG | {"use_rslora": True}, overlooks_the_configuration),
    "PiSSA beside the file": ({}, CONFIG | {"init_lora_weights": "pissa"}, overlooks_the_configuration),
    "a pattern": ({}, CONFIG | {"alpha_pattern": {"attn.to_q": 64}}, overlooks_patterns),
    "two that disagree": ({"alpha": "4"}, CONFIG, overlooks_every_alpha),
}


def run(command: str, *arguments: object) -> int:
    return main([command, *map(str, arguments), "--quiet"])


@pytest.mark.parametrize("name", LORAS)
def test_an_engine_that_overlooks_what_a_lora_says_is_found(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata, config, overlook = LORAS[name]
    base = tiny.write_component(tmp_path / "base", tiny.weights())
    tensors = tiny.lora_tensors(alpha=None)
    lora = tiny.write_lora(tmp_path / "lora/adapter_model.safetensors", tensors, metadata or None)
    (lora.parent / "adapter_config.json").write_text(json.dumps(config or CONFIG | {"lora_alpha": 4}))
    if config is None:
        lora = lora.rename(tmp_path / "l.safetensors")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        overlook(patch)
        assert run("fuse", base, out, "--lora", lora) == 0
    assert run("verify", out, base, "--lora", lora) == 1
    assert "problem: " in capsys.readouterr().err


def leaves_behind(name: str) -> Patch:
    def patch_it(patch: pytest.MonkeyPatch) -> None:
        sort = repository_files.sort_files

        def wrong(*arguments: Any, **named: Any) -> repository_files.SortedFiles:
            right = sort(*arguments, **named)
            others = tuple(other for other in right.others if not other.startswith(name))
            return replace(right, others=others, left={**right.left, **dict.fromkeys({*right.others} - {*others}, "x")})

        patch.setattr(repository_files, "sort_files", wrong)

    return patch_it


def writes_other_settings(patch: pytest.MonkeyPatch) -> None:
    right = diffusers_layout.diffusers_files
    patch.setattr(
        job,
        "diffusers_files",
        lambda base, **what: right(base, **{**what, "scheduler": {**what["scheduler"], "invert_sigmas": True}}),
    )


FILES: dict[str, Patch] = {
    **{name: leaves_behind(name) for name in ("vae/", "vae/config.json", "tokenizer/vocab.json", "LICENSE")},
    "another setting": writes_other_settings,
}


@pytest.mark.parametrize("name", FILES)
def test_an_engine_that_loses_a_file_or_writes_another_is_found(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.write_pipeline(tmp_path / "base", tiny.weights())
    (base / "tokenizer").mkdir()
    index = json.loads((base / "model_index.json").read_text()) | {"tokenizer": ["transformers", "T"]}
    for file, text in {"tokenizer/vocab.json": "{}", "LICENSE": "x", "model_index.json": json.dumps(index)}.items():
        (base / file).write_text(text)
    (tmp_path / "s.json").write_text('{"shift": 3.0}')
    lora = tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors())
    what = (tmp_path / "out", base, "--lora", lora, "--scheduler", tmp_path / "s.json")
    with monkeypatch.context() as patch:
        FILES[name](patch)
        assert run("fuse", base, tmp_path / "out", *what[2:]) == 0
        assert run("verify", *what) == 1  # even if both go by the same wrong table
    assert run("verify", *what) == 1
