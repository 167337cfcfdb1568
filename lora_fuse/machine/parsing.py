"""JSON and YAML from outside, parsed within bounds: whatever is wrong with a text is a ValueError of one line."""

from __future__ import annotations

import json
from typing import Any

from lora_fuse.machine.text import one_line

DEEPEST = 64  # mappings and lists in one another, of YAML


def parse_json(text: str | bytes) -> Any:
    """The value that JSON stands for.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested too deeply, {error}") from error


def _loader() -> Any:
    """The safe loader; libyaml's where pyyaml was built with it, which takes a tenth of the time."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(text: str) -> None:
    """Look whether YAML is within bounds, without making anything of it.

    An alias stands for what it names at each place that asks, so that nine lines with ten of them each are a thousand
    million values.

    Raises:
        ValueError: it is no YAML, has an alias, or is nested too deeply.
    """
    import yaml

    depth = 0
    try:
        for event in yaml.parse(text, Loader=_loader()):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"it has the alias *{event.anchor}; write the value out")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > DEEPEST:
                raise ValueError(f"it is nested deeper than {DEEPEST}")
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error


def parse_yaml(text: str) -> Any:
    """The value that YAML stands for; a key that is there twice is an error, as the first would be lost.

    Raises:
        ValueError: as `check_yaml`; or a value is none of its kind, such as a date that is not in the calendar.
    """
    import yaml

    class OneOfEach(_loader()):  # type: ignore[misc] # which of two, pyyaml's build decides
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(names) > len(set(names)):
                twice = next(name for name in names if names.count(name) > 1)
                raise yaml.constructor.ConstructorError(None, None, f"the key {twice} is there twice", node.start_mark)
            made: dict[Any, Any] = super().construct_mapping(node, deep)
            return made

    check_yaml(text)
    try:
        return yaml.load(text, OneOfEach)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(one_line(error)) from error
