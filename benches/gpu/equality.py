"""What must not change the result: layouts, a resume, and the engines of several processes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gpu.cases import Cases, Refusal, Skip
from gpu.measure import losses_of, run_quietly, settings_of
from gpu.shapes import make_rows, make_shape, on_gpu
from sftcore.config import TrainConfig

_STEPS = 4
# few enough rows that each step has all, and short enough that one pack holds all
_ROWS, _LENGTH = 4, 512 if on_gpu() else 256
# bfloat16 has 8 bits of mantissa, float32 has 24
_TOLERANCE = 2e-2 if on_gpu() else 1e-4
_SHAPES = ("0.5B", "qwen3", "gemma3", "moe")


def equality(pack: Path, work: Path) -> int:
    """Runs the pairs that must be equal."""
    folder = work / "equality"
    folder.mkdir(parents=True, exist_ok=True)
    layouts = {f"{shape}: packed, padding-free and padded": shape for shape in _SHAPES}
    engines = {
        "DDP": {},
        "FSDP2": {"fsdp": "fsdp2"},
        "ZeRO-2": {"deepspeed": "zero2"},
    }
    resume = "0.5B: resumed and not interrupted"
    cases = Cases(work / "equality.json", [resume, *engines, *layouts])
    rows = make_rows(pack, folder / "rows.jsonl", max_length=_LENGTH, count=_ROWS)
    smallest = make_shape("0.5B", pack, work)
    cases.run(resume, partial(_resumed, smallest, rows, folder))
    plain = cache(partial(_losses, smallest, rows, folder / "plain"))
    for name, more in engines.items():
        cases.run(name, partial(_of_engine, smallest, rows, folder / name, more, plain))
    for name, shape in layouts.items():
        cases.run(name, partial(_layouts, make_shape(shape, pack, work), rows, folder / shape))
    return cases.exit_code()


def _settings(shape: Path, rows: Path, output: Path, **more: Any) -> dict[str, Any]:
    given = {
        "max_length": _LENGTH,
        "max_steps": _STEPS,
        "per_device_train_batch_size": _ROWS,
        "gradient_checkpointing": False,
        **more,
    }
    return settings_of(shape, rows, output, **given)


def _losses(shape: Path, rows: Path, output: Path, **more: Any) -> list[float]:
    return losses_of(run_quietly(TrainConfig(**_settings(shape, rows, output, **more))))


def _apart(one: list[float], two: list[float]) -> float:
    """Returns the largest distance of losses beside their size; infinite where one is not finite."""
    assert len(one) == len(two), f"{len(one)} and {len(two)} losses"
    far = max(abs(a - b) / abs(b) for a, b in zip(one, two, strict=True))
    return far if far == far else float("inf")


def _hold(apart: float, what: str) -> None:
    if apart > _TOLERANCE:
        raise AssertionError(f"{what} differ by {apart:.2e}; expected at most {_TOLERANCE:g}")


def _layouts(shape: Path, rows: Path, folder: Path) -> dict[str, Any]:
    padded = _losses(shape, rows, folder)
    found: dict[str, Any] = {"losses": padded, "tolerance": _TOLERANCE}
    packed = {
        "packing": True,
        "packing_length": _ROWS * _LENGTH,
        "per_device_train_batch_size": 1,
    }
    for name, more in {"padding-free": {"padding_free": True}, "packed": packed}.items():
        result = run_quietly(TrainConfig(**_settings(shape, rows, folder, **more)))
        proof = next(p for p in result["proved"] if p["name"] == "packed against separate logits")
        found[name] = {
            "apart": _apart(losses_of(result), padded),
            "proved": f"{proof['outcome']}: {proof['detail']}",
        }
        _hold(found[name]["apart"], f"the losses {name} and padded")
    return found


def _resumed(shape: Path, rows: Path, folder: Path) -> dict[str, Any]:
    saved = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 0, "lora_dropout": 0.1}
    again = folder / "again"
    for old in (folder / "whole", again):
        shutil.rmtree(old, ignore_errors=True)
    given = _settings(shape, rows, folder / "whole", **saved)
    whole = run_quietly(TrainConfig(**given), saves=True)
    shutil.copytree(whole["output_dir"], again)
    shutil.rmtree(again / f"checkpoint-{_STEPS}")
    more = saved | {"resume_from_checkpoint": str(again / "checkpoint-2")}
    resumed = run_quietly(TrainConfig(**_settings(shape, rows, again, **more)), saves=True)
    name = "adapter_model.safetensors"
    one, two = (load_file(Path(run["last_model_checkpoint"]) / name) for run in (whole, resumed))
    assert one.keys() == two.keys()
    differ = [key for key in one if not torch.equal(one[key], two[key])]
    apart = _apart(losses_of(resumed), losses_of(whole))
    _hold(apart, "the losses of the resumed run and of the other")
    return {
        "bit_for_bit": not differ,
        "tensors": len(one),
        "tensors_that_differ": len(differ),
        "losses_apart": apart,
    }


def _of_engine(
    shape: Path,
    rows: Path,
    folder: Path,
    more: dict[str, Any],
    plain: Callable[[], list[float]],
) -> dict[str, Any]:
    """Runs an engine in processes of its own, on two GPUs where there are two, beside a plain run."""
    if "deepspeed" in more and importlib.util.find_spec("deepspeed") is None:
        raise Skip("deepspeed is not on this machine")
    count = min(2, max(1, torch.cuda.device_count()))
    folder.mkdir(parents=True, exist_ok=True)
    given = _settings(shape, rows, folder / "run", **more)
    given["per_device_train_batch_size"] = _ROWS // count
    path, found = folder / "settings.json", folder / "found.json"
    path.write_text(json.dumps(given), encoding="utf-8")
    found.unlink(missing_ok=True)
    log = _start(count, [str(path), str(found)], folder)
    if not found.is_file():
        raise RuntimeError(f"no process came to its end: {log.read_text('utf-8').strip()[-1500:]}")
    result = json.loads(found.read_text(encoding="utf-8"))
    if "refused" in result:
        raise Refusal(f"with {count} process: {result['refused']}")
    apart = _apart(result.pop("losses"), plain())
    _hold(apart, "the losses of the engine and of a plain run")
    return {"processes": count, **result, "losses_apart": apart}


def _start(count: int, words: list[str], folder: Path) -> Path:
    """Runs `one_rank.py` in processes that have the variables of torchrun; returns what the first wrote.

    They stay in the process group of this part, which torchrun's own would leave.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    paths = [str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared |= {"LOCAL_WORLD_SIZE": str(count), "PYTHONPATH": os.pathsep.join(paths)}
    ranks = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"rank-{rank}.log").open("w", encoding="utf-8") as log:
            command = [sys.executable, str(here / "one_rank.py"), *words]
            environment = {**os.environ, **shared, **own}
            ranks.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    for rank in ranks:
        rank.wait()
    return folder / "rank-0.log"
