"""The command line: ``python -m lora_fuse inspect|plan|fuse|verify|rebuild|explain|extract|unmerge``.

Exit 0: done and right. 1: a check failed. 2: refused, with one ``error:`` line and nothing left behind.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lora_fuse
from lora_fuse.errors import BadConfig, naming_extras
from lora_fuse.machine import OnceParser, interrupts, text

if TYPE_CHECKING:
    from lora_fuse import Fused, LoraInput, Plan, Selection
    from lora_fuse.hub import streamed_base
    from lora_fuse.release import Published, Trusted

SHOWN = 3  # names of a list


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and give its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    doing = given[0] if given else ""
    kept = "shards that are finished are kept beside OUT, which is as it was; the same command goes on with them"
    kept = kept if doing in ("fuse", "rebuild") else interrupts.KEPT
    return interrupts.guarded(lambda: _run(_parser().parse_args(given)), kept, doing)


def _run(options: argparse.Namespace) -> int:
    from lora_fuse.machine import progress

    with ExitStack() as stack:
        if getattr(options, "quiet", False):
            stack.enter_context(progress.silence())
            stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(naming_extras(options.command))
        return int(options.run(options))


def _parser() -> argparse.ArgumentParser:
    from lora_fuse.differences.explaining import add_explain
    from lora_fuse.differences.taking_out import add_extract, add_unmerge, run_unmerge
    from lora_fuse.rebuilding import add_rebuild, add_rebuilders
    from lora_fuse.release import add_signer

    parser = OnceParser(prog="python -m lora_fuse", description="Fuse LoRAs into a checkpoint, exactly.")
    commands = parser.add_subparsers(
        required=True, dest="command", metavar="inspect|plan|fuse|verify|rebuild|explain|extract|unmerge"
    )
    inspect = commands.add_parser("inspect", help="what is in a LoRA: format, ranks, alphas, targets")
    inspect.add_argument("lora", type=Path, metavar="LORA")
    inspect.set_defaults(run=_inspect)
    plan = commands.add_parser("plan", help="what would be fused, what refused; writes nothing")
    plan.add_argument("base", type=text.place, metavar="BASE")
    plan.set_defaults(run=_plan)
    fuse = _add_fuse(commands)
    verify = commands.add_parser(
        "verify",
        help="check a download against its list, and who signed it, where a signer is named; with BASE, re-derive the "
        "merge and compare",
    )
    verify.add_argument("merged", type=Path, metavar="MERGED", help="a merged checkpoint, or a published repository")
    verify.add_argument("base", type=text.place, metavar="BASE", nargs="?", help="what it was merged from, as for fuse")
    verify.add_argument("--rows", default="16", metavar="N|all", help="rows of each target to re-derive (default 16)")
    verify.add_argument("--seed", type=int, metavar="N", help="draw the same rows as an earlier verification")
    verify.add_argument("--scheduler", type=Path, metavar="JSON|auto", help="settings that MERGED should have")
    add_signer(verify)
    add_rebuilders(verify)
    verify.set_defaults(run=_verify)
    add_rebuild(commands)
    add_explain(commands)
    add_extract(commands)
    unmerge = add_unmerge(commands)
    unmerge.set_defaults(run=lambda given: run_unmerge(given, _inputs(given), _selection(given)))
    for command in (fuse, verify):
        command.add_argument("--quiet", action="store_true", help="say only what is wrong")
    for command in (plan, fuse):
        command.add_argument(
            "--requantise",
            action="store_true",
            help="of a quantised BASE, quantise the fused weights again as they were (default: write all as BF16)",
        )
    for command in (plan, fuse, verify, unmerge):
        needed = command is not verify
        command.add_argument(
            "--lora", type=Path, action="append", required=needed, default=[], metavar="F", help="file or PEFT folder"
        )
        command.add_argument("--scale", type=float, action="append", metavar="S", help="one for each --lora")
        _add_choices(command)
    for command in (plan, fuse, verify):
        command.add_argument(
            "--dtype", choices=("bfloat16", "float16", "float32"), help="of all floats of OUT; default: as in BASE"
        )
    return parser


def _add_choices(command: argparse.ArgumentParser) -> None:
    """Add the options that say what is fused where, and as what."""
    command.add_argument("--only", action="append", default=[], metavar="P", help="pattern of modules to fuse")
    command.add_argument("--skip", action="append", default=[], metavar="P", help="pattern of modules to leave")
    command.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="P",
        help="pattern of a LoRA's keys that BASE has no module for",
    )
    command.add_argument(
        "--module-scale", action="append", default=[], metavar="P=S", help="multiply every scale there by S"
    )
    command.add_argument(
        "--component",
        action=_AfterLora,
        default=[],
        metavar="NAME",
        help="the component that the --lora before it is for, before the first: all; auto (default): as keys say",
    )


def _add_fuse(commands: Any) -> argparse.ArgumentParser:
    """Add the options that only `fuse` has."""
    fuse: argparse.ArgumentParser = commands.add_parser("fuse", help="write BASE with the LoRAs fused into it to OUT")
    fuse.add_argument(
        "base",
        type=text.place,
        metavar="BASE",
        help="pipeline, component or file; hf://OWNER/NAME@COMMIT: a pipeline on the Hub, fetched while it is fused",
    )
    fuse.add_argument("out", metavar="OUT")
    fuse.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    fuse.add_argument(
        "--untouched", choices=("auto", "reflink", "hardlink", "copy"), default="auto", help="how to take over the rest"
    )
    fuse.add_argument(
        "--scheduler",
        type=Path,
        metavar="JSON|auto",
        help="settings for OUT; auto: the LoRA's; default: the base's",
    )
    fuse.add_argument(
        "--force-quantised",
        action="store_true",
        help="write what --requantise made, however little is left",
    )
    fuse.add_argument(
        "--side-channel",
        action="store_true",
        help="add nothing: OUT is a folder with BASE as it is and the LoRAs beside it, in diffusers' names",
    )
    fuse.add_argument("--replace", action="store_true", help="replace OUT even if lora-fuse did not make it")
    fuse.set_defaults(run=_fuse)
    return fuse


def _inputs(options: argparse.Namespace) -> list[LoraInput]:
    scales = options.scale or [1.0] * len(options.lora)
    if len(scales) != len(options.lora):
        raise BadConfig(f"{len(options.lora)} --lora and {len(scales)} --scale: give one --scale for each --lora")
    given = zip(options.lora, scales, _components(options), strict=True)
    return [lora_fuse.LoraInput(path.stem, path, scale, component) for path, scale, component in given]


class _AfterLora(argparse.Action):
    """Keeps each value with the number of --lora that stand before it."""

    def __call__(
        self, _: argparse.ArgumentParser, given: argparse.Namespace, value: Any, __: str | None = None
    ) -> None:
        setattr(given, self.dest, [*getattr(given, self.dest), (len(given.lora), value)])


def _components(options: argparse.Namespace) -> list[str | None]:
    """The component of each LoRA, None where its keys say it.

    Raises:
        BadConfig: one is given twice for a LoRA, or not for each of several.
    """
    count = len(options.lora)
    by_lora: dict[int, str | None] = {}
    for after, name in options.component:
        if after in by_lora:
            whose = f"--lora {options.lora[after - 1]}" if after else "all"
            raise BadConfig(
                f"--component is given twice for {whose}, {by_lora[after]} and {name}: give the --lora once for each"
            )
        by_lora[after] = name
    by_lora = {after: None if name == "auto" else name for after, name in by_lora.items()}
    if set(by_lora) <= {0}:
        return [by_lora.get(0)] * count
    if set(by_lora) != set(range(1, count + 1)):
        raise BadConfig(
            f"{count} --lora and {len(options.component)} --component: one goes with the --lora before it; give it "
            "after each, or once before the first for all"
        )
    return [by_lora[number] for number in range(1, count + 1)]


def _make_plan(options: argparse.Namespace, base: Path | streamed_base.StreamedBase) -> Plan:
    return lora_fuse.plan(
        base,
        _inputs(options),
        selection=_selection(options),
        requantise=options.requantise,
        dtype=options.dtype,
    )


def _selection(options: argparse.Namespace) -> Selection:
    scales: dict[str, float] = {}
    for given in options.module_scale:
        pattern, _, number = given.rpartition("=")
        if pattern in scales:
            raise BadConfig(f"--module-scale {pattern} is given twice, {scales[pattern]:g} and {number}; give it once")
        try:
            scales[pattern] = float(number)
        except ValueError as error:
            raise BadConfig(f"--module-scale {given!r}: expected PATTERN=NUMBER, as in '*.attn.*=0.5'") from error
    return lora_fuse.Selection(tuple(options.only), tuple(options.skip), scales, tuple(options.leave_out))


def _scheduler(options: argparse.Namespace) -> Mapping[str, object]:
    from lora_fuse.machine import files
    from lora_fuse.models import needed_scheduler

    if options.scheduler is None:
        return {}
    if options.scheduler == Path("auto"):
        found = needed_scheduler([path.name for path in options.lora])
        text.say(f"scheduler auto: that of {found.filename}, for {found.usage}")
        return found.scheduler
    settings = files.read_json(options.scheduler, dict, lambda message: BadConfig(f"--scheduler {message}"))
    return {key: value for key, value in settings.items() if key == "_class_name" or not key.startswith("_")}


def _inspect(options: argparse.Namespace) -> int:
    from lora_fuse.models import alpha_warnings

    lora = lora_fuse.open_lora(options.lora)
    text.say(f"{lora.path}: {len(lora.header.tensors)} keys, {len(lora.deltas)} modules, sha256 {lora.sha256}")
    for line, count in sorted(Counter(delta.description for delta in lora.deltas).items()):
        text.say(f"  {line}: {count} modules")
    dtypes = Counter(tensor.dtype for tensor in lora.header.tensors.values())
    text.say("  dtypes: " + ", ".join(f"{dtype} x {count}" for dtype, count in sorted(dtypes.items())))
    into = Counter(delta.component for delta in lora.deltas)
    if set(into) != {None}:
        said = (f"{name or 'the main one'} x {count}" for name, count in sorted(into.items(), key=str))
        text.say(f"  components: {', '.join(said)}")
    if lora.remarks:
        text.say(f"  header entries that say nothing known: {', '.join(lora.remarks)}")
    for delta in lora.deltas:
        text.say(f"  {delta.module}.{delta.part}  {'x'.join(map(str, delta.shape))}  {delta.strength}")
    for warning in alpha_warnings([(lora.path.name, lora.missing_alphas)]):
        text.say(f"warning: {warning}", sys.stderr)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from lora_fuse.differences import opened

    with opened(options.base) as (base,):
        _print_plan(_make_plan(options, base))
    return 0


def _print_plan(plan: Plan, scheduler: Mapping[str, object] | None = None) -> None:
    from lora_fuse.checkpoint import repository_files
    from lora_fuse.differences import presence_warnings
    from lora_fuse.fusion import cautions

    for warning in [*cautions(plan, scheduler), *presence_warnings(plan)]:
        text.say(f"warning: {warning}", sys.stderr)
    for number, given in enumerate(plan.inputs):
        into = f" into {', '.join(plan.components_of(number))}" if plan.is_of_other_components else ""
        text.say(f"fuse {given.path} at scale {given.scale:g}{into}")
    changed = sum(len(part.targets) for part in plan.parts)
    tensors = sum(len(part.checkpoint.tensors()) for part in plan.parts)
    text.say(f"{changed} of {tensors} tensors change ({plan.modules} modules in the LoRA files)")
    for part in plan.parts:
        _print_component(part)
    for pattern, reached in plan.reach.items():
        text.say(f"  --{pattern} reaches {len(reached)} modules of the LoRA, {_listed(reached)}")
    for lora in plan.loras:
        if lora.left_out:
            text.say(f"  {lora.path.name}: {len(lora.left_out)} keys are left out, {_listed(lora.left_out)}")
    text.say(f"{len(plan.checkpoint.others)} other files are taken over unchanged")
    for line in repository_files.left_behind(plan.checkpoint.left):
        text.say(f"  {line}")


def _print_component(plan: Plan) -> None:
    """Say of one component what is decoded, left and written."""
    from lora_fuse.machine import progress

    for words, count in plan.source.items():
        what = (
            "the targets are quantised again" if plan.requantise else f"decoded and written as {plan.dtype or 'BF16'}"
        )
        text.say(f"  {count} weights are {words}: {what}")
    if plan.dtype is not None:
        text.say(f"  all floats are written as {plan.dtype}")
    if plan.skipped:
        text.say(
            f"  {len(plan.skipped)} are left as they are by --only and --skip, first {plan.prefix}{plan.skipped[0]}"
        )
    for shard in plan.checkpoint.shards:
        count = sum(1 for target in plan.targets.values() if target.shard is shard)
        text.say(f"  {shard.relative}: {count} targets, {progress.human_bytes(shard.path.stat().st_size)}")


def _listed(names: Sequence[str]) -> str:
    """The first of some names, and the number of the others."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _fuse(options: argparse.Namespace) -> int:
    if options.side_channel and options.requantise:
        raise BadConfig(
            "--side-channel leaves the codes as they are, and --requantise makes new ones: give one of them"
        )
    out = Path(options.out)
    from lora_fuse.differences import opened

    with opened(options.base) as (base,):
        plan = _make_plan(options, base)
        if plan.checkpoint.kind == "file" and not options.side_channel and options.out.endswith(os.sep):
            raise BadConfig(
                f"BASE is a file, and OUT {options.out} a folder; name the file to write, {out / options.base.name}"
            )
        scheduler = _scheduler(options)
        _print_plan(plan, scheduler)
        with warnings.catch_warnings(action="ignore"):  # they are printed
            fused = lora_fuse.fuse(
                plan,
                out,
                device=options.device,
                untouched=options.untouched,
                scheduler=scheduler,
                replace=options.replace,
                force_quantised=options.force_quantised,
                side_channel=options.side_channel,
                show_progress=True,
            )
    _print_fused(fused, options.out)
    return 0


def _print_fused(fused: Fused, out: str) -> None:
    from lora_fuse.machine import progress

    files = fused.manifest.files
    total = progress.human_bytes(sum(file.size for file in files.values()))
    written = progress.human_rate(fused.bytes_written, fused.seconds)
    text.say(f"merged: {out}, {total} in {len(files)} files; written: {written}")
    if (cost := fused.manifest.requantised) is not None:
        left = f"{cost.cosine:.4f} of the change is left (cosine), noise {cost.noise_over_change:.3g} of its energy"
        text.say(f"quantised again: {left}")
    for name, file in files.items():
        if file.origin == "fused":
            text.say(f"  {file.sha256}  {name}")
    if fused.sharing:
        text.say(fused.sharing)


def _verify(options: argparse.Namespace) -> int:
    from lora_fuse.rebuilding import run_rebuilders
    from lora_fuse.release import is_published, release_of, trusted_of

    if options.rows != "all" and not (options.rows.isdigit() and int(options.rows) > 0):
        raise BadConfig(f"--rows is {options.rows!r}; give a number of rows, or all")
    if (options.base is None) != (not options.lora):
        raise BadConfig("BASE and --lora go together: give both to check the merge, none to check a download alone")
    trusted = trusted_of(options)
    expected = release_of(options)
    asked = trusted or expected or options.rebuilders
    if not asked and options.base is not None and not is_published(options.merged):
        return _verify_merge(options, None)
    code, published = _verify_download(options.merged, trusted, expected)
    if options.rebuilders is not None:
        code = max(code, run_rebuilders(options.merged, options.rebuilders))
    return code if options.base is None else max(code, _verify_merge(options, published))


def _verify_download(folder: Path, trusted: Trusted | None, expected: Mapping[str, str]) -> tuple[int, Published]:
    from lora_fuse.machine import progress
    from lora_fuse.release import check_published

    found = check_published(folder, trusted, expected)
    text.say(f"verify: {found.files} files of {folder} compared with its list, {found.signature}")
    text.say(f"  release, by its list: {found.release}")
    if found.absent[0]:
        gone = f"{found.absent[0]} files, {progress.human_bytes(found.absent[1])}"
        text.say(f"  a recipe: its weights ({gone}) are not there; python -m lora_fuse rebuild {folder} OUT makes them")
    _print_findings(found.notes, found.problems)
    outcome = f"passed, {found.signature}" if not found.problems else f"FAILED, {len(found.problems)} problems"
    text.say(f"download: {outcome}")
    return 1 if found.problems else 0, found


def _verify_merge(options: argparse.Namespace, published: Published | None) -> int:
    if published and published.absent[0]:
        raise BadConfig(
            f"{options.merged} is a recipe, and {published.absent[0]} files of it are not there; make them first: "
            f"python -m lora_fuse rebuild {options.merged} OUT"
        )
    if published and published.recipe_note:
        text.say(f"  note: {published.recipe_note}")
    from lora_fuse.differences import opened

    with opened(options.base) as (base,):
        found = lora_fuse.verify(
            options.merged,
            base,
            _inputs(options),
            rows="all" if options.rows == "all" else int(options.rows),
            selection=_selection(options),
            dtype=options.dtype or (published.dtype if published else None),
            pipeline=published.pipeline if published else None,
            scheduler=_scheduler(options) or (published.scheduler if published else {}),
            beside=published.beside if published else frozenset(),
            seed=options.seed,
            show_progress=True,
        )
    text.say(
        f"verify: {found.targets} targets ({found.modules} modules), {found.rows_checked} of {found.rows_total} rows, "
        f"{found.tensors_untouched} tensors and {found.files_untouched} files identical to the base"
    )
    if found.left_out:
        text.say(f"  {found.left_out} keys of the LoRA are left out, of modules that the base has not")
    if found.drawn and found.drawn.rows:
        text.say(f"  and {found.drawn.rows} rows drawn at random; --seed {found.drawn.seed} draws them again")
    if found.changes:
        norms = sorted(change.relative_norm for change in found.changes.values())
        same = sum(change.unchanged for change in found.changes.values()) / len(found.changes)
        spread = f"{norms[0]:.3g} to {norms[-1]:.3g}, median {norms[len(norms) // 2]:.3g}"
        text.say(f"  norm of difference over weight: {spread}; {same:.1%} of the weights are unchanged by rounding")
    if (update := found.update).cosine is not None:
        kept = f"cosine {update.cosine:.6g}, noise {update.noise:.3g} of its energy"
        text.say(f"  change written against change meant: {kept}")
    for warning in found.warnings:
        text.say(f"warning: {warning}", sys.stderr)
    _print_findings(found.notes, found.problems)
    text.say("verify: passed" if found.passed else f"verify: FAILED, {found.problem_count} problems")
    return 0 if found.passed else 1


def _print_findings(notes: Sequence[str], problems: Sequence[str]) -> None:
    for note in notes:
        text.say(f"  note: {note}")
    for problem in problems:
        text.say(f"  problem: {problem}", sys.stderr)
