"""Nothing is left behind after an ordinary end, after a failure half way, or after Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest
import ray
from helpers.tiny_models import TinyModel, TinyModelFactory
from helpers.watching import actors, descendants, wait_for
from safetensors.torch import load_file, save_file

import cqil_dist as cqil

SCRIPT = """
import signal, sys
# A test runner in the background passes on that it ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
import cqil_dist as cqil
with cqil.launch(sys.argv[1], "P2 S0 E6 D1", ranks=2, max_len=64) as engine:
    print("pids", *[rank.pid for rank in engine.status().ranks], flush=True)
    if sys.argv[2] == "fail":
        raise RuntimeError("the user's own code failed")
    for chunk in engine.generate("x", max_tokens=63, ignore_eos=True):
        print("token", flush=True)
    import time
    time.sleep(60)  # the signal comes before the end, however late
"""


@pytest.fixture(scope="module")
def model(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model()


def test_a_local_launch_leaves_no_process(model: TinyModel) -> None:
    """No process is left, however the launch ends.

    Two launches run at a time, because starting Ray is mostly waiting; with more, Ray may give up
    its own waits on a machine with few cores."""
    endings = ("fail", "interrupt", "kill")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(partial(check_a_local_launch_leaves_no_process, model), endings))


def check_a_local_launch_leaves_no_process(model: TinyModel, ending: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(model.path), ending],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "RAY_ADDRESS": ""},
    )
    try:
        assert process.stdout is not None
        ranks = [int(pid) for pid in process.stdout.readline().split()[1:]]
        assert len(ranks) == 2, (ending, process.communicate(timeout=60))
        family = [child.pid for child in descendants(of=process.pid)]
        ours = [*actors("LayerActor"), *actors("Coordinator")]
        if ending in ("interrupt", "kill"):
            process.stdout.readline()  # a token: generation is under way
            sent = signal.SIGINT if ending == "interrupt" else signal.SIGKILL
            process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0, errors
        if ending == "kill":
            # Nobody is left to take Ray down; what Ray's own agents do then is Ray's affair.
            family = [pid for pid in family if pid in ours]
        wait_for(
            lambda: not any(psutil.pid_exists(pid) for pid in (*ranks, *family)),
            f"all processes end after: {ending}",
            timeout_s=20,
        )
    finally:
        if process.poll() is None:
            process.kill()


def test_a_failure_half_way_leaves_no_actor(
    cluster: None, model: TinyModel, tmp_path: Path
) -> None:
    """A tensor of one layer is misshapen: other ranks load well, then everything is taken down."""
    broken = tmp_path / "broken"
    shutil.copytree(model.path, broken)
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.5.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        cqil.CheckpointError, match=r"layers\.5\.mlp\.down_proj\.weight.*\[48, 40\]"
    ):
        cqil.launch(str(broken), "P2 S0 E6 D0", ranks=2)
    wait_for(
        lambda: not (actors("LayerActor") or actors("Coordinator")), "actors end", timeout_s=20
    )
    wait_for(lambda: ray.available_resources()["CPU"] == 8, "their CPUs are free", timeout_s=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 9}, r"9 ranks of 1 CPU each.*8 CPU"),
        ({"ranks": 2, "strategy": "STRICT_SPREAD"}, r"STRICT_SPREAD.*8 CPU"),
        ({"ranks": 2, "threads_per_rank": 5}, r"2 ranks of 5 CPU each"),
        ({"ranks": 2, "device": "cuda"}, r"1 GPU each"),
    ],
)
def test_missing_resources_are_named_within_30_s(
    cluster: None, model: TinyModel, options: dict[str, object], message: str
) -> None:
    started = time.monotonic()
    with pytest.raises(cqil.InsufficientResources, match=message):
        cqil.launch(str(model.path), "sequential", **options)  # type: ignore[arg-type]
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"plan": "P2 S12 E28 D0"}, cqil.PlanError, "E is 28 but the model has 6 layers"),
        ({"strategy": "WIDE"}, cqil.LaunchError, "WIDE.*PACK"),
        ({"max_len": 4096}, cqil.LaunchError, "max_len is 4096 .* 128"),
        ({"slots": 0}, cqil.LaunchError, "slots is 0"),
        ({"dtype": "int4"}, cqil.LaunchError, "int4"),
    ],
)
def test_wrong_options_are_named(
    cluster: None,
    model: TinyModel,
    options: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        cqil.launch(str(model.path), **options)  # type: ignore[arg-type]
