"""Laws of a regression that a launcher starts as several processes: real launches, two CPU processes over gloo."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers.integrations.accelerate import check_and_set_device_map

from lora_fuse.errors import BadConfig, NoDevice
from lora_fuse.machine.launch import Process, is_first_to_fail, this_process
from lora_fuse.machine.staging import holding
from lora_fuse.pictures import distributed as spread
from tests.support.workspace import METRICS, Workspace

PLAIN = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
COST = ("seconds", "steps_per_s", "peak_host_bytes")


def launch(processes: int, *program: str) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]  # its word for torchrun
    port = 29500 + os.getpid() % 2000  # tests may run side by side
    return [*launcher, *PLAIN, "--main_process_port", str(port), "--num_processes", str(processes), *program]


@pytest.fixture(scope="module")
def workspace(built: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return built.copy(tmp_path_factory.mktemp("spread") / "checkout")


def results(workspace: Workspace) -> dict[str, bytes]:
    folder = workspace.root / "artifacts/regression"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def measured(metrics: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in metrics.items() if not key.endswith(COST)}


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def test_more_processes_than_cases_make_the_same_pictures_and_metrics_as_one(workspace: Workspace) -> None:
    before, alone = results(workspace), workspace.read(METRICS)
    (workspace.root / METRICS).unlink()
    done = workspace.run(*launch(3, "-m", "stages.regress"))
    assert done.stdout.count("regress: exact on ") == 1  # one of the three speaks
    after = results(workspace)
    assert measured(workspace.read(METRICS)) == measured(alone)
    assert after.keys() == before.keys()
    same = [name for name in before if name.startswith("images/")] + ["candidates.json", "blocks.json"]
    assert len(same) > 4
    assert all(after[name] == before[name] for name in same)


def children(parent: int) -> dict[int, int]:
    """The processes of a launch by their number on this machine."""
    found: dict[int, int] = {}
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with suppress(OSError):  # it has ended meanwhile, as the launcher's own questions to the system do
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            local = [one.removeprefix("LOCAL_RANK=") for one in variables if one.startswith("LOCAL_RANK=")]
            found |= {int(number): int(pid) for number in local}
    return found


def status(pid: int, field: str) -> str:
    found = re.search(rf"^{field}:\s+(\S+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return found[1] if found else "0"


def listens(pid: int) -> bool:
    """A thread of its waits for the launcher's signal."""
    return bool(int(status(pid, "SigBlk"), 16) & 1 << signal.SIGTERM - 1)


def is_rendering(pid: int) -> bool:
    """It has loaded the libraries, so it loads weights, and makes pictures with them for the rest of its life."""
    return "tokenizers" in Path(f"/proc/{pid}/maps").read_text()


def kill(workspace: Workspace, lost: int, *program: str, ready: Callable[[int], bool]) -> str:
    """Launch two processes, kill one of them when both are ready; what all of them said."""
    process = subprocess.Popen(
        launch(2, *program),
        cwd=workspace.root,
        env={**workspace.env, "PYTHONPATH": str(workspace.root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 120
    while lost not in (found := children(process.pid)) or not all(map(ready, found.values())):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(found[lost], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    return output


def test_a_lost_process_is_one_error_and_leaves_the_last_results(workspace: Workspace) -> None:
    before = results(workspace)
    slow = ["sampling.steps=300", "sampling.sigmas=null"]
    output = kill(workspace, 1, "-m", "stages.regress", *slow, ready=lambda pid: listens(pid) and is_rendering(pid))
    assert len(errors(output)) == 1, output
    assert "another process of this run ended" in output
    assert "nothing was written" in output
    assert results(workspace) == before


SHARED = """
import sys, time
from lora_fuse.machine.interrupts import guarded
from lora_fuse.errors import OutOfMemory
from lora_fuse.pictures.distributed import DistributedRenderer, take_gpu

team = DistributedRenderer("cpu", 2)
take_gpu(team.here.local)  # as on a GPU: the variables that it leaves must not change who has which case

def render(cases):
    if cases == sys.argv[1:]:
        raise OutOfMemory(f"case {cases[0]} does not fit")
    time.sleep(300)

sys.exit(guarded(lambda: team.render(["a", "b"], "a key", render) is None))
"""


@pytest.fixture(scope="module")
def script(workspace: Workspace) -> str:
    """Refuses the case that is its argument, and renders all others for ever."""
    path = workspace.root / "shared.py"
    path.write_text(SHARED)
    return path.name


def test_the_first_process_lost_is_an_error_of_the_others(workspace: Workspace, script: str) -> None:
    output = kill(workspace, 0, script, ready=listens)
    assert len(errors(output)) == 1, output
    assert "another process of this run ended" in output


def test_what_one_process_refuses_is_said_once_and_ends_the_others(workspace: Workspace, script: str) -> None:
    done = workspace.run(*launch(2, script, "b"), code=1, env={"PYTHONPATH": str(workspace.root)})
    assert errors(done.stdout + done.stderr) == ["error: case b does not fit"]
    assert done.stderr.count("Traceback") == 1  # the launcher's own


def launched(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", count), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))


def test_without_a_launcher_a_process_is_alone_and_imports_no_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert this_process() == Process(0, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some clusters set it for every job
    monkeypatch.setenv("RANK", "1")
    assert this_process().is_alone
    code = (
        "import sys; from lora_fuse.pictures.distributed import DistributedRenderer as D; "
        "print(D('cuda', None).render([1, 2], 'key', list), {'accelerate', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1, 2] set()"


def test_only_the_first_that_fails_speaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = []
    for rank in (1, 0, 2):
        launched(monkeypatch, rank, 3)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        said.append(is_first_to_fail())
    assert said == [True, False, False]
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert not is_first_to_fail()
    launched(monkeypatch, 2, 4)
    monkeypatch.setenv("LOCAL_RANK", "0")  # of a process that took a GPU
    assert not is_first_to_fail()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # the first of the second machine
    assert is_first_to_fail()


@pytest.mark.parametrize(("visible", "local", "given"), [(None, 3, "3"), ("4,7", 1, "7"), ("GPU-a, GPU-b", 1, "GPU-b")])
def test_every_process_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, local: int, given: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    spread.take_gpu(local)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == given
    assert check_and_set_device_map("cuda") == {"": torch.device("cuda:0")}  # where transformers loads its models


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(NoDevice, match=r"'0,1', and process 2 .* as many processes as there are GPUs"):
        spread.take_gpu(2)
    with pytest.raises(NoDevice, match="2 processes had the same GPU, here GPU-a"):
        spread.check_devices([("k", "here GPU-a"), ("k", "here GPU-a")])
    with pytest.raises(NoDevice, match="different kinds of machine, k and l"):
        spread.check_devices([("k", "here GPU-a"), ("l", "there GPU-b")])


@pytest.mark.parametrize(
    ("placement", "threads", "said"),
    [("balanced", None, "balanced spreads a model over all GPUs, and 2 processes"), ("cpu", None, "regress.threads")],
)
def test_settings_that_make_no_sense_with_several_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch, placement: str, threads: int | None, said: str
) -> None:
    launched(monkeypatch, 0, 2)
    with pytest.raises(BadConfig, match=said):
        spread.DistributedRenderer(placement, threads)


def test_a_stage_that_is_one_process_says_so(workspace: Workspace) -> None:
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    done = workspace.run(sys.executable, "-m", "stages.fuse", env=env, code=2)
    assert done.stderr.strip() == "error: fuse runs as one process, and a launcher started 2"


@pytest.mark.parametrize("stage", ["download", "fuse", "verify", "regress", "export", "gate", "publish", "approve"])
def test_no_stage_does_anything_to_a_build_that_another_is_at(workspace: Workspace, stage: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in (workspace.root / "artifacts").rglob("*.json")}
    reason = ["--reason", "it is purple"] if stage == "approve" else []
    with holding(workspace.root / "artifacts"):
        said = workspace.stage(stage, *reason, code=2)
    assert said.strip() == "error: another run is writing artifacts; wait for it to end"
    assert {path: path.stat().st_mtime_ns for path in (workspace.root / "artifacts").rglob("*.json")} == before
