"""PEFT's configuration of an adapter: `adapter_config.json`, or the same JSON in a file's header. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from lora_fuse.errors import BadLora
from lora_fuse.lora.name_patterns import NamePatterns, is_a_name
from lora_fuse.lora.peft_fields import DEFAULT_ALPHA, FIELDS, check_fields
from lora_fuse.lora.scaling import StatedScale
from lora_fuse.machine import files

# The fields that only the configuration of an adapter has.
TELLING = {name for name in FIELDS if "lora" in name or name.startswith(("peft_", "rank_", "alpha_"))} | {"r"}


def parse_adapter_config(text: str, where: str, label: str) -> list[StatedScale]:
    """Read PEFT's `adapter_config.json`, or JSON in which diffusers puts a component's name before each field.

    Returns:
        The statement of each component, as a rule one; `label` is its place for a reader, `where` that of an error.

    Raises:
        BadLora: it is not such JSON, a pattern is no regular expression, or it asks for what cannot be merged.
    """
    try:
        entries = files.parse_json(text)
        if not isinstance(entries, dict):
            raise ValueError(f"it holds a {type(entries).__name__}")
    except ValueError as error:
        raise BadLora(f"{where} is not a PEFT configuration: {error}") from error
    return [
        config_scale(fields, where, f"{label} ({component})" if component else label, component)
        for component, fields in by_component(entries).items()
    ]


def by_component(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields by the component before their names, as in ``unet.r``; the empty one for those without.

    Source: `_pack_dict_with_prefix` in diffusers/loaders/lora_base.py.
    """
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in entries.items():
        component, _, name = key.rpartition(".")
        groups[component][name] = value
    return groups


def config_scale(
    fields: Mapping[str, Any], where: str, label: str, component: str, default_alpha: float | None = DEFAULT_ALPHA
) -> StatedScale:
    """The statement of a configuration's fields, each of them checked; `default_alpha` counts where no place says one.

    Raises:
        BadLora: a field is of the wrong type, or asks for what cannot be merged.
    """
    check_fields(fields, where)
    try:
        stated = StatedScale(
            label,
            rank=int(fields["r"]) if fields.get("r") is not None else None,
            alpha=float(fields["lora_alpha"]) if fields.get("lora_alpha") is not None else None,
            default_alpha=default_alpha,
            rank_stabilized=_flag(fields, "use_rslora") or False,
            rank_pattern=NamePatterns({k: int(v) for k, v in (fields.get("rank_pattern") or {}).items()}, where),
            alpha_pattern=NamePatterns({k: float(v) for k, v in (fields.get("alpha_pattern") or {}).items()}, where),
            component=component,
            dora=_flag(fields, "use_dora"),
            bias=_flag(fields, "lora_bias"),
            has_expressions=not all(map(is_a_name, _patterns(fields))),
        )
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise BadLora(f"{where} is not a PEFT configuration: {error}") from error
    if stated.rank_stabilized and stated.alpha is None and default_alpha is None:
        raise BadLora(
            f"{where} says use_rslora and no alpha that it is about; write .alpha tensors with the right value"
        )
    return stated


def _patterns(fields: Mapping[str, Any]) -> Iterator[object]:
    """All that PEFT takes for regular expressions; where it takes a list for names, that is none."""
    for name in ("rank_pattern", "alpha_pattern"):
        yield from fields.get(name) or {}
    given = [fields.get(name) for name in ("target_modules", "exclude_modules", "layers_pattern")]
    yield from (one for one in given if isinstance(one, str))
    yield from given[-1] if isinstance(given[-1], list) else ()


def _flag(fields: Mapping[str, Any], name: str) -> bool | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, not true or false")
    return value


def is_peft_config(entries: object) -> bool:
    """True for JSON that speaks of an adapter: it has a field that no other configuration has."""
    if not isinstance(entries, dict):
        return False
    return any(set(fields) & TELLING for fields in by_component(entries).values())
