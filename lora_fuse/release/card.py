"""The model card of a merged checkpoint: what it is made of, how to use it, how to build it again. Pure text.

Invariant: a card names only what others can get. Local paths are left out, and every picture that it shows is
published beside it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from lora_fuse.hub import client
from lora_fuse.models import pair_warnings
from lora_fuse.recipe import License, Manifest, records
from lora_fuse.release.licences import MergeLicence

TEMPLATE = """\

# {{ title }}

{{ lora_count }} fused into {{ base }}. The weights are complete: no LoRA is loaded, only the settings below are kept.
{{ targets }} weights are fused; every other tensor is the base's, byte for byte.

```python
{{ snippet }}
```

{% if example -%}
This makes the first of the pictures below; another machine or dtype moves it a little.

{% endif -%}
{% for warning in warnings -%}
> **Warning:** {{ warning }}.

{% endfor -%}
Keep the scheduler of this repository, and run exactly {{ steps }} steps at `true_cfg_scale` {{ cfg }}.

## What is in it

| | source | commit | file sha256 | scale | licence |
|---|---|---|---|---|---|
| base | {{ base }} | {{ base_commit }} | | | {{ base_licence }} |
{% for lora in loras -%}
| LoRA | {{ lora.source }} | {{ lora.commit }} | `{{ lora.sha256 }}` | {{ lora.scale }} | {{ lora.licence }} |
{% endfor %}
{{ licence }}
{% if evidence.blocks %}
How much the LoRAs change each block: the largest relative norm of the difference of any of its weights.

![change of each block]({{ evidence.blocks }})
{% endif %}
## Checked before publishing

{{ evidence.verdict }}
{% if evidence.cases %}
Every case was rendered from this repository and from base + LoRA unfused, with the same seed and noise, in one run
({{ evidence.environment }}), and compared with a picture that was approved. "Over floor" is how far the latents of
merged and unfused are apart, in times of what rounding alone does.

| case | verdict | PSNR to approved | PSNR to unfused | over floor |
|---|---|---|---|---|
{% for case in evidence.cases -%}
| {{ case.name }} | {{ case.verdict }} | {{ case.to_golden }} | {{ case.to_unfused }} | {{ case.over_floor }} |
{% endfor %}
| case | prompt, seed | {{ "input | " if pictured_inputs }}merged |
|---|---|---|{{ "---|" if pictured_inputs }}
{% for case in evidence.cases -%}
| {{ case.name }} | {{ case.prompt | cell }}, seed {{ case.seed }} | {% if pictured_inputs -%}
{% for picture in case.inputs %}![input of {{ case.name }}]({{ picture }}){% endfor %} | {% endif -%}
![{{ case.name }}]({{ case.picture }}) |
{% endfor -%}
{% endif %}
## Limits

- The checks say that this is base + LoRA, rounded once, and that the cases' pictures are the approved ones. They do not
  say that a picture is good, and see nothing that no case exercises.
- Other steps, another CFG or another scheduler are not what was checked.
- What base and LoRA cannot do, and what they were not meant for, holds here as well: see their cards.
- The LoRA is in the weights. It cannot be taken out or scaled any more; another scale is another build.

{% if exports -%}
## Other formats

| file | format | sha256 |
|---|---|---|
{% for export in exports -%}
| `{{ export.path }}` | {{ export.format }} | `{{ export.sha256 }}` |
{% endfor %}
{% endif -%}
## Check it

```bash
{{ verify }}
```

compares every file with `lora_fuse.json`, which says what this was made of, and checks the signature if there is one.
`provenance.json` is the same as an in-toto statement (SLSA provenance), `bom.cdx.json` as a CycloneDX bill of
materials.

## Build it again

```bash
{{ rebuild }}
```

with lora-fuse {{ version }}. The bytes do not depend on the machine. The fused files come to these sha256:

```
{% for name, sha256 in fused -%}
{{ sha256 }}  {{ name }}
{% endfor -%}
```
"""

EXAMPLE = "Change the rabbit's color to purple"


@dataclass(frozen=True, slots=True)
class Usage:
    """How a checkpoint is meant to be run.

    `pipeline` is the diffusers class that loads it, `true_cfg_scale` 1.0 no guidance, `negative_prompt` None absent;
    `condition_area` the pixels that input pictures are scaled to, None to leave that to the pipeline.
    """

    pipeline: str
    steps: int
    true_cfg_scale: float
    negative_prompt: str | None
    condition_area: int | None

    @property
    def edits(self) -> bool:
        """Whether it takes a picture: the pipelines of diffusers that do have it in their name."""
        return "Edit" in self.pipeline

    @property
    def task(self) -> str:
        """The Hub's name of the task (huggingface.co/tasks)."""
        return "image-to-image" if self.edits else "text-to-image"


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


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was checked: the gate's sentence, on what kind of machine, the cases, the plot of the blocks (its path)."""

    verdict: str
    environment: str = ""
    cases: tuple[ShownCase, ...] = ()
    blocks: str | None = None


@dataclass(frozen=True, slots=True)
class ShownExport:
    """A file in another format: its path in the repository, a few words on the format, its sha256."""

    path: str
    format: str
    sha256: str


def model_card(
    manifest: Manifest,
    *,
    usage: Usage,
    evidence: Evidence,
    licence: MergeLicence,
    tool: records.Tool,
    repo_id: str | None,
    exports: Sequence[ShownExport] = (),
) -> str:
    """A README.md with front matter as the Hub reads it (huggingface.co/docs/hub/model-cards).

    Args:
        manifest: what the checkpoint is made of.
        usage: how it is meant to be run.
        evidence: what was checked, and the pictures.
        licence: that it is published under.
        tool: what wrote the merge.
        repo_id: where it is published; None for a folder.
        exports: what it holds in other formats.
    """
    # Markdown, not HTML: escaping would spoil it.
    environment = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # noqa: S701
    environment.filters["cell"] = _cell
    count, example = len(manifest.loras), _example(usage, evidence)
    text = environment.from_string(TEMPLATE).render(
        title=(repo_id or manifest.recipe or "merged").rpartition("/")[2],
        lora_count="A LoRA is" if count == 1 else f"{count} LoRAs are",
        base=_base(manifest),
        base_commit=_commit(manifest.base.revision if manifest.base else None),
        base_licence=_licence(manifest.base.license if manifest.base else None),
        targets=manifest.targets,
        warnings=pair_warnings(*manifest.pair),
        snippet=_snippet(usage, repo_id or "merged", example),
        example=example,
        steps=usage.steps,
        cfg=f"{usage.true_cfg_scale:g}",
        loras=[_row(lora) for lora in manifest.loras],
        licence=_licence_sentence(licence),
        evidence=evidence,
        pictured_inputs=any(case.inputs for case in evidence.cases),
        exports=exports,
        verify=_verify(repo_id),
        rebuild=_rebuild(manifest, repo_id),
        version=tool.version + (f" (git {tool.git})" if tool.git else ""),
        fused=[(name, file.sha256) for name, file in sorted(manifest.files.items()) if file.origin == "fused"],
    )
    return client.card_text(_front_matter(manifest, usage, licence.license), text)


def _front_matter(manifest: Manifest, usage: Usage, licence: License) -> dict[str, Any]:
    named = [manifest.base.repo_id if manifest.base else None, *(lora.repo_id for lora in manifest.loras)]
    repos = list(dict.fromkeys(repo for repo in named if repo))
    lineage: dict[str, Any] = {"base_model": repos, "base_model_relation": "merge"} if repos else {}
    words = [licence.name or "unknown" if licence.id == "other" else None, licence.link]
    named_licence = {key: word for key, word in zip(("license_name", "license_link"), words, strict=True) if word}
    return {
        "license": licence.id,
        **named_licence,
        **lineage,
        "library_name": "diffusers",
        "pipeline_tag": usage.task,
        "tags": ["lora-fuse", "merge", f"{usage.steps}-steps"],
    }


def _cell(text: str) -> str:
    """A table's cell: a line, in which no sign means anything."""
    line = " ".join(text.split())
    return "".join(f"\\{sign}" if sign in "\\|`*_[]<>" else sign for sign in line)


def _commit(revision: str | None) -> str:
    return f"`{revision}`" if revision else ""


def _licence(stated: License | None) -> str:
    return "not stated" if stated is None else stated.label


def _licence_sentence(settled: MergeLicence) -> str:
    if settled.problem is not None:
        return (
            "> **Warning:** the licence of this merge is not settled, and it is not for the public: "
            f"{settled.problem.partition(';')[0]}."
        )
    how = ", stated by hand" if settled.license.origin == "by hand" else ""
    parts = ", ".join(dict.fromkeys(settled.notices.values()))
    return f"Licence of the merge: {settled.license.label}{how}; its parts: {parts}. Keep the notices of all of them."


def _base(manifest: Manifest) -> str:
    return f"`{manifest.base.repo_id}`" if manifest.base and manifest.base.repo_id else "a local base"


def _row(lora: records.MergedLora) -> dict[str, str]:
    source = f"`{lora.repo_id}`, `{lora.filename}`" if lora.repo_id else f"`{lora.name}`, a local file"
    known = {"commit": _commit(lora.revision), "sha256": lora.sha256, "scale": f"{lora.scale:g}"}
    return {"source": source, "licence": _licence(lora.license), **known}


def _example(usage: Usage, evidence: Evidence) -> ShownCase | None:
    """The case that the snippet makes: the first one whose pictures are there."""
    return next((case for case in evidence.cases if bool(case.inputs) == usage.edits), None)


def _snippet(usage: Usage, source: str, example: ShownCase | None) -> str:
    small = usage.edits and usage.condition_area is not None
    pictures = [f'load_image(hf_hub_download("{source}", "{name}"))' for name in (example.inputs if example else ())]
    lines = [
        "import torch",
        f"from diffusers import {usage.pipeline}",
        *(["from diffusers.utils import load_image"] if usage.edits else []),
        *(["from huggingface_hub import hf_hub_download"] if pictures else []),
        *(["from lora_fuse import condition_area"] if small else []),
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f'pipe = {usage.pipeline}.from_pretrained("{source}", dtype=torch.bfloat16).to(device)',
    ]
    prompt = example.prompt if example else EXAMPLE if usage.edits else "A rabbit in a meadow"
    call = [f"prompt={json.dumps(prompt, ensure_ascii=False)}"]
    if usage.edits:
        lines += [f"pictures = [{', '.join(pictures)}]"] if len(pictures) > 1 else []
        one = pictures[0] if pictures else 'load_image("input.png")'
        call += ["image=pictures" if len(pictures) > 1 else f"image={one}"]
    call += [] if usage.negative_prompt is None else [f"negative_prompt={json.dumps(usage.negative_prompt)}"]
    call += [f"num_inference_steps={usage.steps}", f"true_cfg_scale={usage.true_cfg_scale!r}"]
    if example:
        call += [f"{side}={size}" for side, size in (("height", example.height), ("width", example.width)) if size]
        call += [f'generator=torch.Generator("cpu").manual_seed({example.seed})']
    body = ["image = pipe(", *(f"    {argument}," for argument in call), ").images[0]"]
    if small:  # the pipelines have no argument for it
        body = [f"with condition_area({usage.condition_area}):", *(f"    {line}" for line in body)]
    return "\n".join([*lines, *body, 'image.save("output.png")'])


def _verify(repo_id: str | None) -> str:
    folder = f'"$(hf download {repo_id} --quiet)"' if repo_id else "FOLDER"
    return f"python -m lora_fuse verify {folder}"


def _rebuild(manifest: Manifest, repo_id: str | None) -> str:
    """The command line, on what the Hub's client has put in its cache: from there the fuse knows the commits."""
    lines, base = [], "BASE"
    if manifest.base and manifest.base.repo_id:
        lines, base = (
            [f"BASE=$(hf download {manifest.base.repo_id} --revision {manifest.base.revision} --quiet)"],
            '"$BASE"',
        )
    loras = []
    for number, lora in enumerate(manifest.loras, start=1):
        file = shlex.quote(lora.filename or f"{lora.name}.safetensors")
        if lora.repo_id:
            lines.append(f"LORA_{number}=$(hf download {lora.repo_id} {file} --revision {lora.revision} --quiet)")
            file = f'"$LORA_{number}"'
        loras.append(f"--lora {file} --scale {lora.scale!r}")
    scheduler = _scheduler(manifest, repo_id)
    if scheduler.startswith("SCHEDULER="):
        lines, scheduler = [*lines, scheduler], '--scheduler "$SCHEDULER"'
    options = [*loras, *_selection(manifest), *([scheduler] if scheduler else [])]
    return "\n".join([*lines, f"python -m lora_fuse fuse {base} OUT " + " \\\n  ".join(options)])


def _scheduler(manifest: Manifest, repo_id: str | None) -> str:
    name = "scheduler/scheduler_config.json"
    if name not in manifest.files or manifest.files[name].origin != "generated":
        return ""
    return f"SCHEDULER=$(hf download {repo_id} {name} --quiet)" if repo_id else f"--scheduler {name}"


def _selection(manifest: Manifest) -> list[str]:
    chosen = manifest.selection
    if chosen is None:
        return []
    options: list[tuple[str, Sequence[str]]] = [("only", chosen.only), ("skip", chosen.skip)]
    options.append(("module-scale", [f"{pattern}={factor!r}" for pattern, factor in chosen.scales.items()]))
    return [f"--{name} {shlex.quote(value)}" for name, values in options for value in values]
