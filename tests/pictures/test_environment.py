"""Laws of the environment: what pictures depend on is pinned, named, and part of the key of goldens."""

import gc
import json
import platform
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_fuse.errors import NoDevice
from lora_fuse.pictures.environment import Key, check_gpu, uncollected
from lora_fuse.pictures.placement import PLACEMENTS

X86 = platform.machine().lower() in {"x86_64", "amd64"}
CPU = Key("cpu", "x86_64-avx2", 2, "float32", "2.13", "0.42")
CUDA = Key("cuda", "sm90", 0, "bfloat16", "2.13", "0.42")

keys = st.builds(
    Key,
    st.sampled_from(["cpu", "cuda"]),
    st.sampled_from(["a", "b"]),
    st.integers(0, 2),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from(["2.12", "2.13"]),
    st.sampled_from(["0.41", "0.42"]),
    st.sampled_from(["", "flash"]),
    st.booleans(),
)


def test_a_key_is_a_folder_s_name() -> None:
    assert str(CPU) == "cpu-x86_64-avx2-2threads-float32-torch2.13-diffusers0.42"
    assert str(CUDA) == "cuda-sm90-bfloat16-torch2.13-diffusers0.42"
    other = replace(CUDA, attention="flash", compiled=True)
    assert str(other) == "cuda-sm90-bfloat16-flash-compiled-torch2.13-diffusers0.42"
    assert other.differences(CUDA) == ["attention flash, there memory-efficient", "compiled True, there False"]


@given(keys, keys)
def test_different_keys_have_different_names_and_every_difference_is_named(one: Key, other: Key) -> None:
    assert (str(one) == str(other)) == (one == other) == (one.differences(other) == [])
    assert "/" not in str(one)
    assert len(one.differences(other)) == len(other.differences(one))


def test_a_difference_has_both_values() -> None:
    assert CPU.differences(replace(CPU, torch="2.12", threads=8)) == ["threads 2, there 8", "torch 2.13, there 2.12"]


@given(keys, st.lists(keys))
def test_the_nearest_key_has_the_fewest_differences_of_those_of_its_device_and_dtype(
    key: Key, others: list[Key]
) -> None:
    kin = [other for other in others if (other.device, other.dtype) == (key.device, key.dtype)]
    nearest = key.nearest(others)
    assert (nearest is None) == (not kin)
    if nearest is not None:
        assert nearest in kin
        assert len(key.differences(nearest)) == min(len(key.differences(other)) for other in kin)
        assert nearest == key.nearest(reversed(others))


REPORT = """
import json, os, sys
from lora_fuse.pictures.environment import environment, make_deterministic
assert "torch" not in sys.modules
make_deterministic({threads})
import torch
here = environment("cpu", "float32")
print(json.dumps({{
    "key": str(here.key), "isa": here.key.isa, "threads": here.key.threads, "torch_threads": torch.get_num_threads(),
    "flags": here.flags, "deterministic": torch.are_deterministic_algorithms_enabled(),
    "tf32": torch.backends.cuda.matmul.allow_tf32, "benchmark": torch.backends.cudnn.benchmark,
    "cublas": os.environ["CUBLAS_WORKSPACE_CONFIG"], "torch": here.torch, "gpu": [here.cuda, here.driver],
    "placement": here.placement,
}}))
"""


def report(threads: int | None, **environment: str) -> dict[str, Any]:
    env = {"PYTHONPATH": ":".join(filter(None, sys.path)), **environment}
    command = [sys.executable, "-c", REPORT.format(threads=threads)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("threads", [1, 3])
def test_a_deterministic_process_has_its_pins_and_threads_and_says_so(threads: int) -> None:
    here = report(threads)
    assert (here["threads"], here["torch_threads"]) == (threads, threads)
    assert f"-{threads}threads-float32-torch" in str(here["key"])
    assert (here["deterministic"], here["tf32"], here["benchmark"]) == (True, False, False)
    assert (here["cublas"], here["placement"], here["gpu"]) == (":4096:8", "cpu", [None, None])
    assert here["torch"] == torch.__version__
    assert {"generator", "deterministic_algorithms", "CUBLAS_WORKSPACE_CONFIG"} <= here["flags"].keys()


@pytest.mark.skipif(not X86, reason="the pins are of x86")
def test_every_x86_processor_takes_the_same_kernels() -> None:
    here = report(1)
    assert here["isa"] == f"{platform.machine()}-avx2"
    pins = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")
    assert [here["flags"][pin] for pin in pins] == ["avx2", "COMPATIBLE", "AVX2"]


@pytest.mark.skipif(not X86, reason="the pins are of x86")
def test_what_was_chosen_outside_stays_and_is_another_environment() -> None:
    here = report(1, ATEN_CPU_CAPABILITY="default", CUBLAS_WORKSPACE_CONFIG=":16:8")
    assert here["isa"] == f"{platform.machine()}-default"
    assert here["cublas"] == ":16:8"
    assert here["flags"]["ATEN_CPU_CAPABILITY"] == "default"


def test_without_a_number_the_threads_are_torch_s_choice() -> None:
    assert report(None, OMP_NUM_THREADS="1")["threads"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if name != "cpu"])
def test_a_placement_that_needs_a_gpu_is_refused_where_there_is_none(placement: str) -> None:
    with pytest.raises(NoDevice, match=rf"regress\.placement {placement} needs a GPU .*set regress\.placement to cpu"):
        check_gpu(placement)
    check_gpu("cpu")


def test_only_what_a_first_import_makes_is_never_looked_at_again() -> None:
    frozen = gc.get_freeze_count()
    with uncollected("torch"):
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
    with uncollected("no_such_library"):
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen
