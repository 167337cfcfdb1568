"""Model card of a merged checkpoint: its parts, its use, the way to build it again. Pure text.

Invariant: a card names only what others can get. Local paths are left out, and every picture that it shows is
published beside it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_fuse.checkpoint import dtypes
from lora_fuse.exports import FORMATS, readers_of
from lora_fuse.hub import client
from lora_fuse.machine import progress, text
from lora_fuse.models import pair_warnings, pipeline_call, pipelines
from lora_fuse.pictures import pages
from lora_fuse.recipe import License, Manifest, records, sections
from lora_fuse.release.licences import WAY_OUT, MergeLicence
from lora_fuse.release.recipe_only import left_out

EXAMPLE = "A rabbit in a meadow"
EXAMPLE_EDIT = "Change the rabbit's color to purple"
SCHEDULER = "scheduler/scheduler_config.json"
AUTO = "auto"  # of --component


@dataclass(frozen=True, slots=True)
class Usage:
    """Settings that a checkpoint is meant to be run with."""

    pipeline: str  # the diffusers class that loads it
    steps: int
    true_cfg_scale: float  # guidance, by whatever name the call has it
    negative_prompt: str | None
    condition_area: int | None  # pixels that input pictures are scaled to; None leaves that to the pipeline
    call_sigmas: tuple[float, ...] = ()  # that go into the call

    @property
    def call(self) -> pipeline_call.PipelineCall:
        """The row of the class."""
        return pipelines()[self.pipeline]

    @property
    def edits(self) -> bool:
        """Needs a picture."""
        return self.call.edits

    @property
    def guidance(self) -> str:
        """The argument for guidance, and its value."""
        return f"{self.call.guidance.argument} {self.true_cfg_scale:g}"

    @property
    def makes(self) -> str:
        """A word for what comes out: ``image`` or ``video``."""
        return "video" if self.call.makes_clip else "image"

    @property
    def task(self) -> str:
        """The Hub's name of the task (huggingface.co/tasks)."""
        return f"{'image' if self.edits else 'text'}-to-{self.makes}"


@dataclass(frozen=True, slots=True)
class ShownCase:
    """A case of the regression as the card shows it; pictures are POSIX paths of the repository, sizes in pixels."""

    name: str
    prompt: str
    seed: int
    height: int | None
    width: int | None
    verdict: str
    to_golden: str
    to_unfused: str
    over_floor: str
    picture: str
    inputs: tuple[str, ...]
    frames: int | None = None  # of a clip, of which the picture has the first, the middle and the last


@dataclass(frozen=True, slots=True)
class ShownExport:
    """An export as the card shows it: its path in the repository, its format, and what was measured of it, as text.

    `kind` is the class of its transformer.
    """

    path: str
    format: str
    kind: str
    size: str
    sha256: str
    error: str
    lora: str
    over_floor: str

    @property
    def words(self) -> str:
        """A few words on the format."""
        return FORMATS[self.format].words

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that read it, each with the version from which on."""
        return tuple(f"{engine.name} ({engine.versions})" for engine in readers_of(self.format))

    def loading(self, source: str) -> list[tuple[str, str, text.Markdown]]:
        """The way to load it for each engine: name, language (empty: in words), and command or code."""
        found = []
        for engine in readers_of(self.format):
            quoted = QUOTED[engine.language]
            load = text.Markdown(engine.loading(quoted(self.path), quoted(source), self.kind))
            found.append((engine.name, "" if engine.language == "words" else engine.language, load))
        return found


# A name as it stands within quotes or as a word, by the language of what names it.
QUOTED: Mapping[str, Callable[[str], str]] = {
    "python": lambda name: json.dumps(text.line(name), ensure_ascii=False)[1:-1],
    "sh": lambda name: shlex.quote(text.line(name)),
    "words": lambda name: str(text.markdown(name)),
}


@dataclass(frozen=True, slots=True)
class ShownChange:
    """The cosine of the change that was written with the one that was meant, and the energy that rounding added."""

    name: str
    cosine: float
    noise: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """Checks before publishing: the gate's sentence, the kind of machine, the cases, path of the plot of the blocks.

    `kept` is what the weights have of the change that was meant, of all first and then the least first, `warnings` are
    those of the weights' check, `exports` the files in other formats, which were judged too. With `smaller` the
    pictures are smaller copies.
    """

    verdict: str
    environment: str = ""
    cases: tuple[ShownCase, ...] = ()
    blocks: str | None = None
    kept: tuple[ShownChange, ...] = ()
    warnings: tuple[str, ...] = ()
    exports: tuple[ShownExport, ...] = ()
    smaller: bool = False


def model_card(
    manifest: Manifest,
    *,
    usage: Usage,
    evidence: Evidence,
    licence: MergeLicence,
    tool: records.Tool,
    publish: sections.PublishParams,
) -> str:
    """A README.md with front matter as the Hub reads it (huggingface.co/docs/hub/model-cards).

    Without a `repo_id` it is the card of a folder.
    """
    repo_id = publish.repo_id
    recipe = publish.weights == "recipe"
    source = "OUT" if recipe else repo_id or "merged"
    example = next((case for case in evidence.cases if len(case.inputs) in usage.call.pictures), None)
    inputs = example.inputs if example else ()
    prompt = example.prompt if example else EXAMPLE_EDIT if usage.edits else EXAMPLE
    scheduler = SCHEDULER if SCHEDULER in manifest.files and manifest.files[SCHEDULER].origin == "generated" else None
    body = pages.render_page(
        "lora_fuse.release",
        "card.md.j2",
        filters={"word": _word, "python": _python, "file": _file},
        manifest=manifest,
        usage=usage,
        dtype="bfloat16" if manifest.dtype is None else dtypes.DTYPES[manifest.dtype].array_name,
        evidence=evidence,
        repo_id=repo_id,
        tag=publish.tag,
        signer=publish.signing.signer,
        title=(repo_id or manifest.recipe or "merged").rpartition("/")[2],
        source=source,
        warnings=[*pair_warnings(*manifest.pair), *evidence.warnings],
        example=example,  # the case that the snippet makes
        pictures=[_picture(repo_id or source, name) for name in inputs],
        area=usage.condition_area if usage.edits else None,  # the pipelines have no argument for it
        prompt=prompt,
        licence=_licence_sentence(licence),
        scheduler=scheduler,
        options=text.Markdown(" \\\n  ".join(build_options(manifest, scheduler, repo_id))),
        rebuild=text.Markdown(rebuild_command(manifest, publish)) if recipe else None,
        absent=_size_of_absent(manifest),
        version=tool.version + (f" (git {tool.git})" if tool.git else ""),
    )
    return client.card_text(_front_matter(manifest, usage, licence.license), body + "\n")


def _front_matter(manifest: Manifest, usage: Usage, licence: License) -> dict[str, Any]:
    named = [manifest.base.repo_id if manifest.base else None, *(lora.repo_id for lora in manifest.loras)]
    repos = list(dict.fromkeys(text.line(repo) for repo in named if repo))
    fields = {
        "license": licence.id,
        "license_name": text.line(licence.name or "unknown") if licence.id == "other" else None,
        "license_link": text.line(licence.link) if licence.link else None,
        "base_model": repos,
        "base_model_relation": "merge" if repos else None,
        "library_name": "diffusers",
        "pipeline_tag": usage.task,
        "tags": ["lora-fuse", "merge", f"{usage.steps}-steps"],
    }
    return {key: value for key, value in fields.items() if value}


def _licence_sentence(licence: MergeLicence) -> text.Markdown:
    if licence.problem is not None:
        problem = text.markdown(licence.problem.removesuffix(f"; {WAY_OUT}"))
        return text.Markdown(
            f"> **Warning:** the licence of this merge is not settled, and it is not for the public: {problem}."
        )
    how = ", stated by hand" if licence.license.origin == "by hand" else ""
    parts = ", ".join(dict.fromkeys(licence.notices.values()))
    return text.markdown(
        f"Licence of the merge: {licence.license.label}{how}; its parts: {parts}. Keep the notices of all of them."
    )


def _word(value: str) -> text.Markdown:
    """A word of a command line, on one line."""
    return text.Markdown(shlex.quote(text.line(value)))


def _python(value: str | None) -> text.Markdown:
    """A string, or None, as Python has it; characters that nobody sees are escaped as Python reads them."""
    return text.Markdown(None if value is None else text.line(json.dumps(value, ensure_ascii=False)))


def _file(lora: records.MergedLora) -> text.Markdown:
    return _word(_name(lora))


def _name(lora: records.MergedLora) -> str:
    return lora.filename or f"{lora.name}.safetensors"


def _picture(repo_id: str, name: str) -> text.Markdown:
    return text.Markdown(f"load_image(hf_hub_download({_python(repo_id)}, {_python(name)}))")


def _size_of_absent(manifest: Manifest) -> str:
    sizes = [manifest.files[name].size for name in left_out(manifest, {})]
    return f"{len(sizes)} files, {progress.human_bytes(sum(sizes))}"


def rebuild_command(manifest: Manifest, publish: sections.PublishParams) -> str:
    """The command that makes the weights of a recipe; what has no address on the Hub is named on it."""
    place = f"{publish.repo_id}@{publish.tag}" if publish.tag else publish.repo_id
    words = ["python -m lora_fuse rebuild", _word(place) if place else "FOLDER", "OUT"]
    if manifest.base is None or manifest.base.repo_id is None:
        words.append("--base BASE")
    words += [f"--lora {_word(f'{lora.name}={_name(lora)}')}" for lora in manifest.loras if lora.repo_id is None]
    return " ".join(words)


def _component(lora: records.MergedLora) -> str:
    """The component that a LoRA was fused into; of several, its keys say them."""
    return lora.components[0] if len(lora.components) == 1 else AUTO


def build_options(manifest: Manifest, scheduler: str | None = None, repo_id: str | None = None) -> list[str]:
    """Options of the `fuse` that builds a merge again, on files in the Hub client's cache: it knows their commits."""
    options = []
    for number, lora in enumerate(manifest.loras, start=1):
        file = f'"$LORA_{number}"' if lora.repo_id else _file(lora)
        component = " ".join(["", "--component", _word(_component(lora))]) if manifest.components else ""
        options.append(f"--lora {file} --scale {lora.scale!r}{component}")
    if chosen := manifest.selection:
        scales = [f"{pattern}={factor!r}" for pattern, factor in chosen.scales.items()]
        for name, values in (
            ("only", chosen.only),
            ("skip", chosen.skip),
            ("module-scale", scales),
            ("leave-out", chosen.leave_out),
        ):
            options += [f"--{name} {_word(value)}" for value in values]
    if scheduler:
        options.append('--scheduler "$SCHEDULER"' if repo_id else f"--scheduler {scheduler}")
    return options
