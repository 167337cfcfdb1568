"""Fuse LoRAs into a diffusion checkpoint, prove the result, compare its pictures. Works without DVC or Hydra.

From Python: `plan`, `fuse` and `verify`, with the refusals of the command line, which calls them (`lora_fuse.api`).
Everything else is in a room, and a room imports only from those above it:

    errors        the whole error vocabulary
    machine       files, staging folders, disk space, progress, terminal, signals
    quantisation  weights in few bits: codes and scales, to and from float32
    checkpoint    safetensors headers, shards and indexes, diffusers repositories
    lora          LoRA files: key formats, scaling, targets, the exact arithmetic of their deltas
    models        the model families that are known, and their wrong pairs
    recipe        a build's parameters, its locks and records, the paths of its results
    fusion        plan and write a merge: streamed, the exact sum rounded once
    verification  the merge derived a second time, by code that shares nothing with `fusion`
    exports       the merged transformer in other formats, quantised too
    hub           lock, fetch, stream and publish repositories
    pictures      render, measure and compare
    differences   a checkpoint held against its base: which LoRAs are in it
    regression    goldens, verdicts, the report
    release       model card, provenance, bill of materials, signature; a download checked
    rebuilding    a published checkpoint made again byte for byte, and signed statements on that
    studies       validation of a LoRA, sweeps over scales, the catalog, the doctor
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
