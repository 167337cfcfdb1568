"""Parsers of weights that are codes, of names in another spelling, of exports with their records, of nodes' results."""

import io
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save

import lora_fuse
from lora_fuse import LoraInput
from lora_fuse.checkpoint.stored.gguf_file import read_gguf_header, with_entry
from lora_fuse.errors import LoraFuseError
from lora_fuse.exports import problems, read_export
from lora_fuse.fleet import archive
from lora_fuse.machine import FileRecord, file_state, files
from lora_fuse.models import name_maps
from lora_fuse.pictures import metrics
from lora_fuse.recipe import Artifacts, Recipe, records
from lora_fuse.regression.exported import JudgedExport, check_exports, flat_exports
from lora_fuse.regression.exported.export_records import places_of
from lora_fuse.regression.exported.export_verdicts import ExportedCase, Measures, WeightFigures, verdict_of
from lora_fuse.regression.recorded_numbers import RecordedNumbers
from lora_fuse.verification.other_names import OtherNames
from tests.fuzz import formats
from tests.fuzz.bounds import ROOT, own_folder
from tests.fuzz.parsers import Parser, these, write
from tests.fuzz.stage_records import encoded, recipe
from tests.support import codes, tiny

KIND = "int8_tensorwise convrot 16"
MARK = f"{codes.MODULES[0]}.comfy_quant"
LAYERS = {"layers": {codes.MODULES[0]: {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}}}
CONFIG = json.loads((ROOT / "pocket/model/transformer/config.json").read_text())
PARAMETERS = {f"single_transformer_blocks.3.attn.to_{part}.weight": 4 for part in "qkv"}
PARAMETERS |= {"single_transformer_blocks.3.proj_mlp.weight": 16, "transformer_blocks.0.norm.weight": 2}
NAMES = (
    b"single_blocks.3.linear1.weight\nlora_unet_single_blocks_3_linear1\nsingle_transformer_blocks.3.attn.to_q.weight",
)
FORMAT = "int8_convrot"
RECORD = FileRecord(7, "5" * 64)


@cache
def gguf_file() -> bytes:
    with own_folder() as folder:
        path = codes.write("Q8_0", folder).path
        with path.open("rb") as file:
            header = read_gguf_header(file, path.stat().st_size, "x")
            return bytes(with_entry(header, "an entry", "é") + file.read())


@cache
def coded_file() -> bytes:
    return bytes(save(codes.tensors(KIND)[0], metadata={"format": "pt", "_quantization_metadata": json.dumps(LAYERS)}))


def gguf_header(_: Path, content: bytes) -> None:
    header = read_gguf_header(io.BytesIO(content), len(content), "x")
    with_entry(header, "another", "entry")


def coded_base(name: str, content: Callable[[], bytes]) -> Callable[[Path], None]:
    """A base of codes, a LoRA, and their merge."""

    def prepare(folder: Path) -> None:
        write(folder, {name: content()})
        lora = tiny.write_lora(folder / "l.safetensors", codes.lora())
        plan = lora_fuse.plan(folder / name, [LoraInput("l", lora, 1.0)])
        lora_fuse.fuse(plan, folder / "out.safetensors", device="cpu")

    return prepare


def planned_and_verified(name: str, made: Callable[[bytes], bytes] = bytes) -> Callable[[Path, bytes], object]:
    """Plan a merge into the base, and verify one; both readers hold, whatever the other one says."""

    def parse(folder: Path, content: bytes) -> None:
        write(folder, {name: made(content)})
        lora = LoraInput("l", folder / "l.safetensors", 1.0)
        refused = None
        try:
            lora_fuse.plan(folder / name, [lora])
        except LoraFuseError as error:
            refused = error
        lora_fuse.verify(folder / "out.safetensors", folder / name, [lora], rows=1, seed=1)
        if refused is not None:
            raise refused

    return parse


def with_mark(content: bytes) -> bytes:
    made, _ = codes.tensors(KIND)
    return bytes(save(made | {MARK: np.frombuffer(content, np.uint8)}))


def with_layers(content: bytes) -> bytes:
    made = {name: tensor for name, tensor in codes.tensors(KIND)[0].items() if name != MARK}
    return bytes(save(made, metadata={"_quantization_metadata": content.decode("utf-8", "replace")}))


def exported(name: str) -> Callable[[Path, bytes], object]:
    """An export, as it is measured and as its readers' rules see it."""

    def parse(folder: Path, content: bytes) -> None:
        write(folder, {name: content})
        problems(folder / name, CONFIG)
        for _ in read_export(folder / name):
            pass

    return parse


def spelt(_: Path, content: bytes) -> None:
    """Names of a LoRA's parameters, a line each, in a base that has others."""
    for name in content.decode("utf-8", "replace").split("\n"):
        for one in name_maps.maps():
            one.translate(name, PARAMETERS)
        OtherNames(PARAMETERS).find([name])
        name_maps.made_for([[name]], list(PARAMETERS))


def unpacked(folder: Path, content: bytes) -> None:
    archive.read(content, "a.json")
    archive.unpack(content, folder / "made")


@cache
def packed() -> bytes:
    with own_folder() as folder:
        write(folder, {"a.json": b"{}", "images/b.png": b"12345"})
        return archive.pack(folder)


def seen(folder: Path, content: bytes) -> None:
    """States of files that were hashed on this machine."""
    write(folder, {"seen.json": content, "a": b"12345"})
    found = file_state.SeenFiles(folder / "seen.json")
    state = file_state.FileState(5, 0, 0, 1, 1)
    found.knows(folder / "a", state, RECORD)
    found.note(folder / "a", state, RECORD)
    found.write()


def numbers_of(content: bytes) -> RecordedNumbers:
    said = files.parse_json(content)
    return RecordedNumbers(Path("metrics.json"), said if isinstance(said, dict) else {})


def clip_numbers(_: Path, content: bytes) -> None:
    numbers_of(content).comparison("a.golden", of_clips=True)


def judged_exports(folder: Path, content: bytes) -> None:
    """The numbers of an export, as the gate judges them again."""
    at = Artifacts(folder / "artifacts")
    write(folder, {"artifacts/export.json": encoded(records.Exports(1, "d" * 64, {place(): RECORD}))})
    numbers = numbers_of(content)
    check_exports(exporting(), at, numbers, {"a": None})


def place() -> str:
    """The path of the export's file below their folder."""
    return places_of(exporting())[FORMAT]


@cache
def exporting() -> Recipe:
    return recipe().model_copy(update={"export": recipe().export.model_copy(update={"formats": (FORMAT,)})})


@cache
def export_numbers() -> bytes:
    measures = Measures(WeightFigures(relative_l2=0.01, worst_l2=0.01, from_best=0.1), {"a": ExportedCase()})
    limits = {str(name): bound for name, bound in recipe().regress.exports[FORMAT].items()}
    verdict, reasons = verdict_of(measures, limits, recipe().regress.over_floor)
    one = JudgedExport(FORMAT, place(), RECORD, measures, verdict, reasons, limits)
    return json.dumps(flat_exports([one])).encode()


CLIP = {f"a.golden.{name}": 1.0 for name in metrics.EVERY} | {"a.golden.identical": False}
SEEN = {"/x": {"size": 5, "mtime_ns": 0, "ctime_ns": 0, "inode": 1, "device": 1, "sha256": "5" * 64}}
DESCRIPTION = LAYERS["layers"][codes.MODULES[0]]


def side_channel(folder: Path) -> None:
    """A base of codes with a LoRA beside it."""
    coded_base("base.safetensors", coded_file)(folder)
    plan = lora_fuse.plan(folder / "base.safetensors", [LoraInput("l", folder / "l.safetensors", 1.0)])
    lora_fuse.fuse(plan, folder / "beside", device="cpu", side_channel=True)


def beside(folder: Path, content: bytes) -> None:
    write(folder, {"beside/loras/l.safetensors": content})
    lora = LoraInput("l", folder / "l.safetensors", 1.0)
    lora_fuse.verify(folder / "beside", folder / "base.safetensors", [lora], rows=1, seed=1)


@cache
def kept_lora() -> list[bytes]:
    with own_folder() as folder:
        side_channel(folder)
        return [(folder / "beside/loras/l.safetensors").read_bytes()]


def rows() -> Iterator[Parser]:
    yield Parser("GGUF header", gguf_header, formats.raw, lambda: [gguf_file()], examples=40)
    gguf = coded_base("b.gguf", gguf_file)
    yield Parser("base of codes, GGUF", planned_and_verified("b.gguf"), formats.raw, lambda: [gguf_file()], gguf)
    coded = coded_base("b.safetensors", coded_file)
    file = planned_and_verified("b.safetensors")
    yield Parser("base of codes, safetensors", file, formats.SAFETENSORS, lambda: [coded_file()], coded)
    for name, made, said in (("a mark", with_mark, DESCRIPTION), ("layers of a header", with_layers, LAYERS)):
        parse = planned_and_verified("b.safetensors", made)
        yield Parser(f"base of codes, {name}", parse, formats.JSON, these(json.dumps(said).encode()), coded)
    yield Parser("export, safetensors", exported("x.safetensors"), formats.SAFETENSORS, lambda: [coded_file()])
    yield Parser("export, GGUF", exported("x.gguf"), formats.raw, lambda: [gguf_file()])
    yield Parser("LoRA beside a base", beside, formats.SAFETENSORS, kept_lora, side_channel, examples=0)  # imports peft
    yield Parser("names of the other spelling", spelt, formats.raw, these(*NAMES))
    yield Parser("result of a node", unpacked, formats.raw, lambda: [packed()])
    yield Parser("sources.seen.json", seen, formats.JSON, these(json.dumps(SEEN).encode()))
    numbers = (ValueError,)
    clip = these(json.dumps(CLIP).encode())
    yield Parser("numbers of a clip", clip_numbers, formats.JSON, clip, errors=numbers)
    exports = [export_numbers()]
    yield Parser("numbers of exports", judged_exports, formats.JSON, lambda: exports, errors=numbers)
