"""Code that a base asks for in its JSON: a class of its own, or one of another repository or library. Pure.

Libraries run such code for who trusts it, and one asks on the terminal whether it may. Nothing here runs any of it: a
plain fuse says that the base asks for it, and what loads a base into a pipeline refuses the base. So it does with one
whose configuration asks for more parts than any model has, which a library would begin to make.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

# The libraries whose classes a `model_index.json` may name.
LIBRARIES = ("diffusers", "transformers")
# diffusers' own folders of pipelines that define components; a model_index.json names such a one in a library's place.
PIPELINES = frozenset(
    {"ace_step", "alt_diffusion", "audio_diffusion", "audioldm2", "blip_diffusion", "deepfloyd_if", "flux", "ideogram4"}
    | {"kandinsky", "kolors", "latent_diffusion", "ltx", "ltx2", "marigold", "paint_by_example", "shap_e"}
    | {"spectrogram_diffusion", "stable_audio", "stable_audio_3", "stable_diffusion", "stable_diffusion_safe"}
    | {"stable_diffusion_attend_and_excite", "unclip", "unidiffuser", "versatile_diffusion", "vq_diffusion"}
    | {"wuerstchen"}
)
# Keys whose value says which code to run: transformers (`auto_map`, `custom_pipelines`), diffusers, both.
CODE = frozenset({"auto_map", "custom_pipeline", "custom_pipelines", "custom_generate", "trust_remote_code"})
# Keys whose value is the name of one class.
CLASSES = frozenset(
    {"_class_name", "processor_class", "tokenizer_class"}
    | {"feature_extractor_type", "image_processor_type", "video_processor_type"}
)
# Keys that choose among implementations, each by a word; with a slash it is a repository of kernels (transformers).
PARTS = re.compile(r"\w*(layer|block|depth|head|expert|stage)s?(_\w*)?")  # keys of a configuration that count parts
MOST_PARTS = 10_000
IMPLEMENTATIONS = frozenset({"attn_implementation", "_attn_implementation", "experts_implementation"})


def asked_code(name: str, content: object) -> Iterator[str]:
    """Words on each entry of a JSON file that asks for code; `name` is the file's POSIX path."""
    if PurePosixPath(name).name == "model_index.json" and isinstance(content, dict):
        for part, value in content.items():
            if not part.startswith("_") and isinstance(value, list) and not (is_setting(value) or _is_known(value)):
                yield _words(name, part, value, f"a component is a class of {' or '.join(LIBRARIES)}")
    for key, value in _entries(content):
        if key in CODE and value and isinstance(value, (str, list, dict, bool)):
            yield _words(name, key, value, "it names code to run")
        elif key in CLASSES and value and not (isinstance(value, str) and value.isidentifier()):
            yield _words(name, key, value, "it is not the plain name of a class")
        elif key in IMPLEMENTATIONS and "/" in reprlib.repr(value):
            yield _words(name, key, value, "it names a repository of compiled code")


def countless_parts(name: str, content: object) -> Iterator[str]:
    """Words on each entry of a component's `config.json` that asks for more parts than any model has."""
    if PurePosixPath(name).name != "config.json":
        return
    for key, value in _entries(content):
        numbers = value if isinstance(value, list) else [value]
        if PARTS.fullmatch(key) and any(isinstance(one, (int, float)) and one > MOST_PARTS for one in numbers):
            yield _words(name, key, value, f"no model has more than {MOST_PARTS} of them")


def is_setting(values: list[Any]) -> bool:
    """True for a list of a `model_index.json` that is no component: of numbers, which name no library and no class."""
    return bool(values) and all(isinstance(value, (int, float)) for value in values)


def _is_known(pair: list[Any]) -> bool:
    """True for the two nulls of a component that is left out, and for a class of a library that is known."""
    if pair == [None, None]:
        return True
    known = len(pair) == 2 and all(isinstance(name, str) for name in pair)
    return known and (pair[0] in LIBRARIES or pair[0] in PIPELINES) and pair[1].isidentifier()


def _words(name: str, key: str, value: object, why: str) -> str:
    return f"{name} says {key} = {reprlib.repr(value)}, and {why}"


def _entries(content: object) -> Iterator[tuple[str, object]]:
    """Every key of every mapping in parsed JSON, and its value; without recursion, as it may be deep."""
    left = [content]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            yield from one.items()
            left += one.values()
        elif isinstance(one, list):
            left += [inner for inner in one if isinstance(inner, (dict, list))]
