"""The strength of each module of a LoRA file by all that says it: `.alpha` tensors, the header, the configuration.

Read apart from the engine, on purpose: what one of the two overlooks the other sees. Nothing is refused here. What is
not understood, and two places that disagree, are problems.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_fuse.machine import files
from lora_fuse.verification.peft_reading import STRENGTH, Claim, read_config
from lora_fuse.verification.weights import StoredTensor

Parts = Mapping[str, npt.NDArray[Any] | StoredTensor]

# Header entries of one number, for all modules or those of the component before a dot, and what PEFT calls them.
NUMBERS = dict.fromkeys(("alpha", "lora_alpha", "network_alpha"), "lora_alpha")
NUMBERS |= dict.fromkeys(("rank", "r", "lora_rank", "lora_dim", "network_dim"), "r")
FLAGS = {"use_rslora": "use_rslora", "rslora": "use_rslora", "rs_lora": "use_rslora", "use_dora": "use_dora"}
# A field that makes JSON the configuration of an adapter, wherever it stands.
TELLING = {*STRENGTH, "peft_type", "init_lora_weights", "lora_dropout"}
WORDS = {"alpha", "alphas", "rslora", "scale", "scales", "scaling", "multiplier", "strength", "dora", "pissa", "olora"}
# How it was trained, not what it is: kohya, ModelSpec, OneTrainer, ai-toolkit, ComfyUI.
TRAINING = ("ss_", "sshs_", "modelspec.", "ot_", "software", "training_info", "prompt", "workflow")
# Fields of a configuration that may be entries of their own.
FIELDS = (*STRENGTH, "init_lora_weights", "use_qalora", "fan_in_fan_out", "layer_replication", "target_parameters")
ENCODERS = ("text_encoder", "image_encoder", "vae")  # components that a module without any is not of
UNSAID = (None, "", "None", "Dynamic")  # kohya's words for a number that the whole run does not have
KOHYA_OTHERS = re.compile(r"algo|preset|rs_lora|\w*(dim|dims|alpha|alphas)")  # arguments that give modules others
MOST_CLAIMS = 100
CLOSE = 2.0**-8  # an alpha may have been stored in bfloat16


@dataclass(slots=True)
class Strength:
    """The claims about a file's modules, each of which is asked for its factor, and what did not add up."""

    claims: list[Claim] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def factor(self, module: str, target: str, parts: Parts) -> float:
        """The factor of a module's product: alpha / rank, or alpha / sqrt(rank) with rsLoRA; 1 where it has no rank.

        `module` is its name in the file, `target` in the base, `parts` its tensors by role.
        """
        rows_are_rank = ("down", "of", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
        rank = next((len(parts[name]) for name in rows_are_rank if name in parts), None)
        if not rank:
            return 1.0
        names = (module.removeprefix("base_model.model."), target)
        claims = self._about(module)
        said = []
        if isinstance(stored := parts.get("alpha"), np.ndarray):
            own = float(stored.reshape(-1)[0]) if stored.size == 1 else math.nan
            said.append((own / rank, f"{module}.alpha says {own:g}"))
        for claim in claims:
            stated = claim.rank_of(names)
            if stated is not None and stated != rank:
                self.problems.append(f"{module} has factors of rank {rank}, and {claim.place} says {stated:g}")
            if claim.dora is not None and "up" in parts and claim.dora != ("dora" in parts):
                there = "a" if "dora" in parts else "no"
                self.problems.append(f"{module} has {there} DoRA, and {claim.place} says {claim.dora}")
            alpha = claim.alpha_of(names)
            if alpha is not None and claim.only_rank in (None, rank):
                said.append(_factor(claim, alpha, rank))
        if not said:
            said = [_factor(claim, claim.default_alpha, rank) for claim in claims if claim.default_alpha is not None]
        for factor, words in said:
            if not math.isfinite(factor):
                self.problems.append(f"{words} for rank {rank}, which is no strength")
            elif not math.isclose(factor, said[0][0], rel_tol=CLOSE):
                self.problems.append(f"{module} has two strengths at rank {rank}: {said[0][1]}, and {words}")
        return said[0][0] if said else 1.0

    def _about(self, module: str) -> list[Claim]:
        """The claims that are of a module: those of no component, and of its own or of the only one."""
        components = {claim.component for claim in self.claims} - {""}
        own = {name for name in components if module.startswith(f"{name}.")}
        own = own or {name for name in components if not name.startswith(ENCODERS)} or components
        if len(own) > 1:
            self.problems.append(f"{module} may be of any component that is spoken of: {', '.join(sorted(own))}")
        return [claim for claim in self.claims if claim.component in {"", *own}]


def _factor(claim: Claim, alpha: float, rank: int) -> tuple[float, str]:
    factor = alpha / math.sqrt(rank) if claim.stabilized else alpha / rank
    return factor, f"{claim.place} says {alpha:g}{' over a square root' if claim.stabilized else ''}"


def read_strength(file: Path, config: Path | None, metadata: Mapping[str, str], keys: set[str]) -> Strength:
    """Read all places outside the tensors: the header of the file, its `config`, and no other."""
    found = Strength()
    flat: dict[str, dict[str, Any]] = {}
    for key, text in metadata.items():
        _read_entry(key, text, f"{file} (header {key})", flat, found)
    for component, entries in flat.items():
        place = f"{file} (header {', '.join(filter(None, (component, '/'.join(entries))))})"
        _add(found, entries, place, component, whole=False)
    _read_kohya(metadata, keys, file, found)
    if config is not None:
        try:
            _read_configuration(files.parse_json(files.read_text(config)), str(config), found)
        except (OSError, ValueError) as error:
            found.problems.append(f"{config} cannot be read: {error}")
    if len(found.claims) > MOST_CLAIMS:
        found.problems.append(f"{file}: {len(found.claims)} claims of strength, of which {MOST_CLAIMS} are read")
        del found.claims[MOST_CLAIMS:]
    biased = any(re.search(r"lora_(B|up)\b.*\.bias$", key) for key in keys)
    denied = [claim for claim in found.claims if claim.bias not in (None, biased)]
    found.problems += [
        f"the file has {'a' if biased else 'no'} bias, and {one.place} says {one.bias}" for one in denied
    ]
    return found


def configuration_of(path: Path) -> tuple[Path, Path | None]:
    """The weights of a LoRA that is a file or PEFT's folder, and the configuration that is theirs."""
    folder = path if path.is_dir() else path.parent
    weights = folder / "adapter_model.safetensors"
    config = folder / "adapter_config.json"
    if path.is_dir():
        return weights, config
    return path, config if config.is_file() and (path.name == weights.name or not weights.is_file()) else None


def _read_entry(key: str, text: str, place: str, flat: dict[str, dict[str, Any]], found: Strength) -> None:
    value = _parsed(text)
    component, _, name = key.rpartition(".")
    known = {**{name: name for name in FIELDS}, **NUMBERS, **FLAGS}
    if key.startswith(TRAINING):
        return
    is_config = isinstance(value, dict) and any(str(inner).rpartition(".")[2] in TELLING for inner in value)
    if key == "lora_adapter_metadata" or is_config:
        _read_configuration(value, place, found)
    elif name in known:
        entries = flat.setdefault(component, {})
        if entries.setdefault(known[name], value) != value:
            found.problems.append(f"{place} says {text}, and another entry {entries[known[name]]}")
    else:
        inner = [str(name) for name in value] if isinstance(value, dict) else []
        words = {word for part in (key, *inner) for word in re.split(r"[^a-z]+", part.lower())}
        if said := sorted(words & WORDS):
            found.problems.append(f"{place} is {text[:60]!r}: {said[0]} is said in a way that nobody here knows")


def _read_configuration(content: Any, place: str, found: Strength) -> None:
    if not isinstance(content, dict):
        found.problems.append(f"{place} is no configuration of a LoRA: it holds {str(content)[:60]!r}")
        return
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        component, _, name = str(key).rpartition(".")
        by_component.setdefault(component, {})[name] = value
    for component, entries in by_component.items():
        _add(found, entries, f"{place} ({component})" if component else place, component)


def _add(found: Strength, entries: Mapping[str, Any], place: str, component: str, *, whole: bool = True) -> None:
    claim = read_config(entries, place, component, found.problems, whole=whole)
    found.claims += [claim] if claim else []


def _read_kohya(metadata: Mapping[str, str], keys: set[str], file: Path, found: Strength) -> None:
    """Read kohya's record of a run's defaults: of modules of that rank, unless its arguments give others."""
    numbers = [metadata.get(name) for name in ("ss_network_alpha", "ss_network_dim")]
    parsed = _parsed(metadata.get("ss_network_args", "{}"))
    arguments: dict[str, Any] = parsed if isinstance(parsed, dict) else {}
    decomposed = _parsed(str(arguments.get("dora_wd"))) is True
    if decomposed and not any(key.endswith("dora_scale") for key in keys):
        found.problems.append(f"{file} (header ss_network_args) says dora_wd, and the file has no dora_scale")
    if numbers[0] in UNSAID:
        return
    place = f"{file} (header ss_network_alpha)"
    has_alphas = any(key.endswith(".alpha") for key in keys)
    trained_there = any(".lora_down." in key for key in keys)
    try:
        alpha = float(str(numbers[0]))
        rank = None if numbers[1] in UNSAID else int(float(str(numbers[1])))
    except (ValueError, OverflowError):
        found.problems.append(f"{place} and ss_network_dim say {numbers}, which are no numbers")
        return
    plain = not any(map(KOHYA_OTHERS.fullmatch, arguments))
    if plain and (has_alphas or (trained_there and rank is not None)):
        found.claims.append(Claim(place, rank=None if has_alphas else rank, alpha=alpha, only_rank=rank))
    elif not has_alphas and alpha != rank:
        found.problems.append(f"{place} says {alpha:g} at rank {rank}, and no tensor says whether the factors have it")


def _parsed(text: str) -> Any:
    """A header's value: JSON, or Python's words for what JSON writes small."""
    try:
        return files.parse_json({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text
