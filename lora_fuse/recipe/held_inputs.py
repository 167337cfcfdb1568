"""Pinned files and input pictures, held to what they were while a stage reads them: what was hashed is what is used.

Before it reads, every file is in the state in which it was hashed (`lora_fuse.machine.file_state`), or is hashed again
and has its lock's sha256. After it has read, every file is in that state still.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lora_fuse.errors import BadSource
from lora_fuse.machine import FileRecord, file_state, progress
from lora_fuse.recipe.hf_cache import AGAIN, locate, other_content
from lora_fuse.recipe.records import Lock


class HeldInputs:
    """The files of some locks, and others, in the states that they have to stay in.

    The others are input pictures and goldens: no lock has them, and what is made of them has their sha256.
    """

    def __init__(self, seen: file_state.SeenFiles, locks: Iterable[Lock], others: Iterable[Path] = ()) -> None:
        """Find the files, and hash those that were not hashed in the state that they are in now.

        Raises:
            BadSource: one is not here, cannot be read, or is not what its lock says.
        """
        self._seen = seen
        self.states = file_state.FileStates()
        self._pinned: dict[Path, tuple[Lock, str]] = {}
        for lock in locks:
            root = locate(lock)
            self._pinned |= {root / name: (lock, name) for name in lock.files}
        for path in others:
            if (state := file_state.state_of(path)) is not None:  # who opens it says that it is not there
                self.states.add(path, state)
        self._hash_unknown()

    def _hash_unknown(self) -> None:
        unknown = []
        for path, (lock, name) in self._pinned.items():
            state = file_state.state_of(path)
            if state is not None and self._seen.knows(path, state, lock.files[name]):
                self.states.add(path, state, lock.files[name])
            else:
                unknown.append(path)
        size = sum(self._record(path).size for path in unknown)
        with progress.byte_progress("hash", size, at_least=progress.FEW) as advance:
            hashed = file_state.in_threads(self._hash, unknown, advance, lambda path: self._record(path).size)
        for path, state in zip(unknown, hashed, strict=True):
            self.states.add(path, state, self._record(path))
        self.keep()

    def _record(self, path: Path) -> FileRecord:
        lock, name = self._pinned[path]
        return lock.files[name]

    def _hash(self, path: Path, advance: file_state.Advance) -> file_state.FileState:
        lock, name = self._pinned[path]
        try:
            record, state = file_state.hash_steady(path, advance)
        except OSError as error:
            raise BadSource(f"{path} cannot be read ({error.strerror}); run the download stage", rerun=AGAIN) from error
        if record != lock.files[name]:
            raise other_content(lock, name, record.sha256)
        return state

    def check(self) -> None:
        """Refuse to go on where a file is not any more as it was.

        Raises:
            BadSource: there is one.
        """
        for path in self.states.changed():
            raise BadSource(f"{path} changed while it was read; run again when nothing writes to it")

    def keep(self) -> None:
        """Keep the states for later runs, which then need not hash."""
        for path in self._pinned:
            self._seen.note(path, self.states[path], self._record(path))
        self._seen.write()
