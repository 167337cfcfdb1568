"""The state of a file shows what happened to it, whoever set its times back; and the record of what was hashed."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from lora_fuse.machine import FileRecord
from lora_fuse.machine.file_state import (
    TICK,
    FileState,
    FileStates,
    SeenFiles,
    hash_steady,
    in_order,
    in_threads,
    state_of,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * 40)
    settle()
    return path


def settle() -> None:
    """Wait until a change has another time than the last one."""
    time.sleep(2 * TICK / 1e9)


def flipped(path: Path) -> None:
    """One byte is another, and the time of the change is set back."""
    before = path.stat()
    with path.open("r+b") as content:
        content.seek(100)
        content.write(b"\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    """Another file of the same size and time has its name."""
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(bytes(before.st_size))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def moved_back(path: Path) -> None:
    """Another file was there, and this one is back."""
    path.rename(path.with_name("aside")).rename(path)


CHANGES = [flipped, replaced, moved_back, Path.unlink, lambda path: os.truncate(path, 100), os.utime]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_shows_in_the_state_though_its_time_is_set_back(file: Path, change: Callable[[Path], None]) -> None:
    states = FileStates()
    states.add(file, FileState.of(file.stat()))
    assert states.changed() == []
    change(file)
    assert states.changed() == [file]


def test_links_that_are_made_here_are_no_change_and_others_are(file: Path, tmp_path: Path) -> None:
    states = FileStates()
    states.add(file, FileState.of(file.stat()))
    with states.linking([file]):
        os.link(file, tmp_path / "second")
        file.chmod(0o444)
    assert states.changed() == []
    settle()
    (tmp_path / "second").unlink()
    assert states.changed() == [file]  # nobody said that it was for a link
    with states.linking():
        os.link(file, tmp_path / "second")
    assert states.changed() == [file]  # it was not as it should be before
    later = FileStates()
    later.add(file, FileState.of(file.stat()))
    with later.linking():
        file.chmod(0o644)
        file.write_bytes(b"another")
    assert later.changed() == [file]


def test_what_may_have_been_linked_by_others_is_hashed_if_it_is_known_what_it_is(file: Path, tmp_path: Path) -> None:
    record, state = hash_steady(file, lambda _: None)
    states = FileStates()
    states.add(file, state, record)
    os.link(file, tmp_path / "second")
    assert states.changed() == []
    settle()
    flipped(file)
    assert states.changed() == [file]
    file.write_bytes(bytes(range(256)) * 40)  # as it was; but somebody wrote to it
    assert states.changed() == [file]


def test_a_file_that_is_written_to_while_it_is_hashed_has_no_hash(file: Path) -> None:
    with pytest.raises(OSError, match="changed while it was read"):
        hash_steady(file, lambda _: flipped(file))
    blob = hashlib.sha1(usedforsecurity=False)
    record, state = hash_steady(file, lambda _: None, blob)
    assert record == FileRecord(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
    assert blob.digest() == hashlib.sha1(file.read_bytes(), usedforsecurity=False).digest()
    assert state == state_of(file)


def test_work_in_threads_is_in_order_and_ends_with_the_first_error() -> None:
    done: list[int] = []

    def work(item: int, advance: Callable[[int], None]) -> int:
        advance(item)
        if item == 3:
            raise ValueError(item)
        return item * item

    assert in_threads(work, range(3), done.append, int) == [0, 1, 4]
    assert sorted(done) == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        in_threads(work, range(100), done.append, int)
    assert in_threads(work, [], done.append, int) == []


def test_results_are_taken_in_order_and_little_is_made_ahead_of_them() -> None:
    weights = [1, 1, 9, 1, 1, 1, 1]
    begun: list[int] = []

    def work(number: int) -> int:
        if number == 5:
            raise ValueError(number)
        return number

    def given() -> Iterator[tuple[int, Callable[[], int]]]:
        for number, weight in enumerate(weights):
            begun.append(number)
            yield weight, partial(work, number)

    with ThreadPoolExecutor(2) as threads:
        results = in_order(threads, given(), 3)
        taken = [(next(results), list(begun)) for _ in range(4)]
        assert [result for result, _ in taken] == [0, 1, 2, 3]
        assert [len(ahead) for _, ahead in taken] == [3, 3, 4, 7]  # what was begun by then, with one that had to wait
        assert next(results) == 4
        with pytest.raises(ValueError, match="5"):
            next(results)


def test_the_largest_is_first_and_the_results_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(os, "cpu_count", lambda: 1)

    def work(item: int, _: Callable[[int], None]) -> int:
        begun.append(item)
        if item < 0:
            raise ValueError(item)
        return item

    assert in_threads(work, [2, 3, 1], lambda _: None, int) == [2, 3, 1]
    assert begun == [3, 2, 1]
    with pytest.raises(ValueError, match="-2"):  # the first of them, whichever was begun first
        in_threads(work, [-2, 5, -1], lambda _: None, int)


def test_what_is_under_way_ends_when_something_failed() -> None:
    ended: list[object] = []

    def work(item: int, advance: Callable[[int], None]) -> None:
        if item == 0:
            raise ValueError
        try:
            while True:
                advance(1)
                time.sleep(0.001)
        except CancelledError:
            ended.append(item)
            raise

    with pytest.raises(ValueError):  # noqa: PT011
        in_threads(work, range(2), lambda _: None, int)
    assert ended in ([1], [])


def test_a_record_knows_a_file_in_the_state_in_which_it_was_hashed(file: Path, tmp_path: Path) -> None:
    place = tmp_path / "seen.json"
    record, state = hash_steady(file, lambda _: None)
    first = SeenFiles(place)
    assert not first.knows(file, state, record)
    first.note(file, state, record)
    first.write()
    seen = SeenFiles(place)
    (tmp_path / "link").symlink_to(file)
    assert seen.knows(tmp_path / "link", state, record)
    assert not seen.knows(file, state, FileRecord(record.size, "5" * 64))
    flipped(file)
    assert not seen.knows(file, FileState.of(file.stat()), record)
    file.unlink()
    other = tmp_path / "other"
    other.write_bytes(b"x")
    settle()
    record, state = hash_steady(other, lambda _: None)
    seen.note(other, state, record)
    seen.write()
    assert list(json.loads(place.read_text())) == [str(other)]  # the first is not there any more


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"/a": 1}', b"\xff"])
def test_a_record_that_is_none_knows_nothing(file: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "seen.json").write_bytes(content)
    record, state = hash_steady(file, lambda _: None)
    seen = SeenFiles(tmp_path / "seen.json")
    assert not seen.knows(file, state, record)
    seen.note(file, state, record)
    seen.write()
    assert SeenFiles(tmp_path / "seen.json").knows(file, state, record)


def test_a_file_that_changed_just_now_is_not_taken_down(tmp_path: Path) -> None:
    """Another change within the same step of the kernel's clock would have the same time."""
    file = tmp_path / "new"
    file.write_bytes(b"x")
    ahead = time.time_ns()
    state = FileState(1, ahead, ahead, 1, 1)
    seen = SeenFiles(tmp_path / "seen.json")
    seen.note(file, state, FileRecord(1, "5" * 64))
    assert not seen.knows(file, state, FileRecord(1, "5" * 64))


def test_a_record_that_cannot_be_written_is_none(file: Path, tmp_path: Path) -> None:
    (tmp_path / "seen.json").mkdir()
    record, state = hash_steady(file, lambda _: None)
    seen = SeenFiles(tmp_path / "seen.json")
    seen.note(file, state, record)
    seen.write()
    assert (tmp_path / "seen.json").is_dir()
