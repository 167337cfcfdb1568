"""Laws of the command line's parser: no value that was given is dropped in silence."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_fuse.cli import _parser, main
from lora_fuse.machine import OnceParser

REPEATED = ("_AppendAction", "_AfterLora")


def options_with_a_value() -> Iterator[tuple[str, str, str, str]]:
    """Each subcommand with each of its options that take one value, and with one that it takes, as given and as shown.

    But for --component, which goes with the --lora before it.
    """
    (commands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    for command, parser in commands.choices.items():
        for action in parser._actions:
            if action.option_strings and action.nargs is None and type(action).__name__ not in REPEATED:
                value = next(iter(action.choices or ["1"]))
                shown = f"{action.type(value)}" if callable(action.type) else value
                yield command, "/".join(action.option_strings), value, shown


def test_every_option_of_the_command_line_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(options_with_a_value())
    assert {"--device", "--rows", "--scheduler", "--untouched"} <= {option for _, option, *_ in found}
    for command, option, value, shown in found:
        with pytest.raises(SystemExit, match="2"):
            main([command, "BASE", *2 * (option.partition("/")[0], value)])
        assert f"argument {option}: given twice, {shown} and {shown}; give it once" in capsys.readouterr().err


def test_two_components_of_one_lora_are_both_named(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    assert main(["plan", str(base), "--lora", "x", "--component", "transformer", "--comp=transformer_2"]) == 2
    said = "error: --component is given twice for --lora x, transformer and transformer_2: give the --lora once for "
    assert capsys.readouterr().err == f"{said}each\n"


def test_a_module_scale_is_given_once_for_a_pattern(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    assert main(["plan", str(base), "--lora", "x", "--module-scale", "a=1", "--module-scale", "a=2"]) == 2
    assert capsys.readouterr().err == "error: --module-scale a is given twice, 1 and 2; give it once\n"


@pytest.mark.parametrize("given", [(), ("-a1", "-q", "-b2", "-q"), ("-l3", "-l4", "-b2")])
def test_what_is_given_once_or_appends_is_as_argparse_has_it(given: tuple[str, ...]) -> None:
    results = []
    for kind in (OnceParser, argparse.ArgumentParser):
        parser = kind()
        parser.add_argument("-a", default="1")
        parser.add_argument("-b", type=int)
        parser.add_argument("-l", action="append", default=[])
        parser.add_argument("-q", action="store_true")
        results.append({name: value for name, value in vars(parser.parse_args(given)).items() if name != "_seen"})
    assert results[0] == results[1]
