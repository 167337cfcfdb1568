"""Files that are something else than safetensors, known by how they begin and not by their name. Pure.

The sentences say what the file is and what to do, so that nobody fetches a second time what is not broken.
"""

from __future__ import annotations

from dataclasses import dataclass

LOOKED_AT = 512  # bytes at the beginning that are enough to know every kind
_CONVERT = (
    "it can run code when it is opened; take the safetensors file of the same model, or load it with "
    "torch.load(…, weights_only=True) and save it with safetensors.torch.save_file"
)
_FETCH = "fetch the file itself, as `hf download OWNER/NAME FILE` does, with a token where one is needed"
_UNPACK = "unpack it and name the .safetensors file in it"


@dataclass(frozen=True, slots=True)
class FileKind:
    """A kind of file: the bytes that it begins with (after spaces, in lower case), its name, and the way out."""

    starts: tuple[bytes, ...]
    what: str
    way_out: str


POINTER = FileKind(
    (b"version https://git-lfs", b"version https://hawser"),
    "a pointer of git-lfs, not the file that it stands for",
    "run `git lfs pull` in its folder, or fetch the file with `hf download`",
)
# By source: ggml-org/ggml docs/gguf.md; zip, as torch.save writes it: APPNOTE.TXT 4.3.7; PROTO of pickletools; git-lfs
# docs/spec.md; HTML and XML error pages; HDF5's format specification, III.A; RFC 1952 (gzip), RFC 8878 (zstd); xz, 7z,
# rar, PNG, JPEG and RIFF by their own; numpy.lib.format; ISO 32000 (PDF).
KINDS = (
    FileKind(
        (b"gguf",),
        "a GGUF file, quantised or converted for llama.cpp and its kin",
        "as a base it is named by itself; of anything else take the safetensors file",
    ),
    FileKind((b"pk\x03\x04",), "a pickle in a zip, as torch.save writes it, or another zip", _CONVERT),
    FileKind(tuple(b"\x80%c" % protocol for protocol in range(2, 6)), "a pickle", _CONVERT),
    POINTER,
    FileKind((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error"), "a web page, saved in place of the file", _FETCH),
    FileKind(
        (b'{"', b"{\n", b"{ ", b"{\r"),
        "JSON: a configuration, or what a server answers when it refuses",
        f"name the folder of a configuration, or {_FETCH}",
    ),
    FileKind(
        (
            b"access to ",
            b"entry not found",
            b"repository not found",
            b"not found",
            b"invalid ",
            b"unauthorized",
            b"forbidden",
        ),
        "a server's refusal, saved in place of the file",
        _FETCH,
    ),
    FileKind((b"\x89hdf",), "an HDF5 file, as Keras writes it", "take the safetensors file of the same model"),
    FileKind((b"\x93numpy",), "a numpy array", "save its tensors with safetensors.numpy.save_file"),
    FileKind((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zxz", b"7z\xbc\xaf", b"rar!"), "a packed archive", _UNPACK),
    FileKind((b"\x89png", b"\xff\xd8\xff", b"riff", b"%pdf"), "a picture or a document", "name the weights' file"),
    FileKind((bytes(16),), "a file of zeros, as a download leaves that was not finished", "fetch it again"),
)


def kind_of(start: bytes) -> FileKind | None:
    """The kind of a file by its first `LOOKED_AT` bytes; None for safetensors and for what is not known."""
    # A header's length in 8 bytes, then its JSON: github.com/huggingface/safetensors, "Format"; some begin with spaces.
    if start[8:].lstrip(b" \t\r\n").startswith(b"{"):
        return None
    begins = start[:LOOKED_AT].lstrip(b" \t\r\n\xef\xbb\xbf").lower()
    return next((kind for kind in KINDS if begins.startswith(kind.starts)), None)
