"""The model card of a merged checkpoint: what it is made of, how to use it, how to build it again. Pure text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jinja2
import yaml

from lora_fuse.families import manifest_warnings
from lora_fuse.records import Manifest, MergedLora

TEMPLATE = """\
---
{{ front_matter }}---

# {{ title }}

{{ lora_count }} fused into {{ base }}. The weights are complete: no LoRA is loaded, only the settings below are kept.
{{ targets }} weights are fused; every other tensor is the base's, byte for byte.

```python
{{ snippet }}
```

{% for warning in warnings -%}
> **Warning:** {{ warning }}.

{% endfor -%}
Keep the scheduler of this repository, and run exactly {{ steps }} steps at `true_cfg_scale` {{ cfg }}.

| | source | commit | file sha256 | scale |
|---|---|---|---|---|
| base | {{ base }} | {{ base_commit }} | | |
{% for lora in loras -%}
| LoRA | {{ lora.source }} | {{ lora.commit }} | `{{ lora.sha256 }}` | {{ lora.scale }} |
{% endfor %}
Checked before publishing: {{ verdict }}

## Build it again

```bash
{{ rebuild }}
```

with lora-fuse {{ version }}. The bytes do not depend on the machine: every file gets the sha256 that it has here.
"""


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


def model_card(
    manifest: Manifest,
    *,
    usage: Usage,
    verdict: str,
    repo_id: str | None,
) -> str:
    """A README.md with front matter as the Hub reads it (huggingface.co/docs/hub/model-cards).

    Local paths are left out: a card is for others, and names only what they can get.

    Args:
        manifest: what the checkpoint is made of.
        usage: how it is meant to be run.
        verdict: the gate's sentence.
        repo_id: where it is published; None for a folder.
    """
    # Markdown, not HTML: escaping would spoil it.
    environment = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # noqa: S701
    count = len(manifest.loras)
    return environment.from_string(TEMPLATE).render(
        front_matter=yaml.safe_dump(_front_matter(manifest), sort_keys=False),
        title=(repo_id or manifest.recipe or "merged").rpartition("/")[2],
        lora_count="A LoRA is" if count == 1 else f"{count} LoRAs are",
        base=_base(manifest),
        base_commit=_commit(manifest.base.revision if manifest.base else None),
        targets=manifest.targets,
        warnings=manifest_warnings(manifest),
        snippet=_snippet(usage, repo_id or "merged"),
        steps=usage.steps,
        cfg=f"{usage.true_cfg_scale:g}",
        loras=[_row(lora) for lora in manifest.loras],
        verdict=verdict.strip(),
        rebuild=_rebuild(manifest),
        version=manifest.tool.version + (f" (git {manifest.tool.git})" if manifest.tool.git else ""),
    )


def _front_matter(manifest: Manifest) -> dict[str, Any]:
    named = [manifest.base.repo_id if manifest.base else None, *(lora.repo_id for lora in manifest.loras)]
    repos = list(dict.fromkeys(repo for repo in named if repo))
    lineage = {"base_model": repos, "base_model_relation": "merge"} if repos else {}
    return {**lineage, "library_name": "diffusers", "tags": ["lora-fuse"]}


def _commit(revision: str | None) -> str:
    return f"`{revision}`" if revision else ""


def _base(manifest: Manifest) -> str:
    return f"`{manifest.base.repo_id}`" if manifest.base and manifest.base.repo_id else "a local base"


def _row(lora: MergedLora) -> dict[str, str]:
    source = f"`{lora.repo_id}`, `{lora.filename}`" if lora.repo_id else f"`{lora.name}`, a local file"
    return {"source": source, "commit": _commit(lora.revision), "sha256": lora.sha256, "scale": f"{lora.scale:g}"}


def _snippet(usage: Usage, source: str) -> str:
    edits = "Edit" in usage.pipeline  # the pipelines of diffusers that take a picture have it in their name
    small = edits and usage.condition_area is not None
    call = ['prompt="Change the rabbit\'s color to purple"' if edits else 'prompt="A rabbit in a meadow"']
    call += ['image=load_image("input.png")'] if edits else []
    call += [] if usage.negative_prompt is None else [f"negative_prompt={json.dumps(usage.negative_prompt)}"]
    call += [f"num_inference_steps={usage.steps}", f"true_cfg_scale={usage.true_cfg_scale!r}"]
    body = ["image = pipe(", *(f"    {argument}," for argument in call), ").images[0]"]
    if small:  # the pipelines have no argument for it
        body = [f"with condition_area({usage.condition_area}):", *(f"    {line}" for line in body)]
    lines = [
        "import torch",
        f"from diffusers import {usage.pipeline}",
        *(["from diffusers.utils import load_image"] if edits else []),
        *(["from lora_fuse.regression.render import condition_area"] if small else []),
        "",
        f'pipe = {usage.pipeline}.from_pretrained("{source}", dtype=torch.bfloat16).to("cuda")',
        *body,
        'image.save("output.png")',
    ]
    return "\n".join(lines)


def _rebuild(manifest: Manifest) -> str:
    if manifest.recipe:
        return f"python -m stages.config recipe={manifest.recipe} fuse.scale={manifest.scale:g}\ndvc repro"
    loras = " ".join(f"--lora {lora.filename or 'LORA'} --scale {lora.scale:g}" for lora in manifest.loras)
    return f"python -m lora_fuse fuse BASE OUT {loras}"
