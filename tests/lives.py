"""Lives of a training: each is a fork of this process, killed at a random moment, until the last one may finish.

`python lives.py MODULE ROOT KILLS`: MODULE is a test file with `life(folder, told)`, which trains with its checkpoints in
`folder`, calls `told()` after each step, before it is saved, and returns the weights as bytes. Prints how many kills hit the
inside of a save, and fails unless the weights are those of a run that was never killed.
"""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch  # noqa: F401 (imported once, before the forks)
from shisa import models

hashed = models.file_sha256


def slowly(path: Path) -> str:
    """Most of a life is to be spent inside a save."""
    time.sleep(0.01)
    return hashed(path)


def start(life: Callable[[Path, Callable[[], object]], bytes], folder: Path) -> tuple[int, int]:
    """Fork a life; its process, and a pipe with one byte a step."""
    heard, told = os.pipe()
    if child := os.fork():
        os.close(told)
        return child, heard
    models.file_sha256 = slowly
    try:
        folder.with_suffix(".bin").write_bytes(life(folder, lambda: os.write(told, b".")))
        os._exit(0)
    except BaseException:  # a fork must never return into its parent's code
        traceback.print_exc()
        os._exit(1)


def main(module: str, root: Path, kills: int) -> int:
    """One whole life, then `kills` short ones and a last; returns how many were killed inside a save."""
    life, draw, inside = import_module(module).life, random.Random(1), 0
    assert os.waitpid(start(life, root / "whole")[0], 0)[1] == 0
    for _ in range(kills):
        child, heard = start(life, root / "killed")
        lived = all(os.read(heard, 1) for _ in range(draw.choice((1, 2, 2, 3))))
        time.sleep(draw.uniform(0, 0.09))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]) and lived
        os.close(heard)
        inside += any((root / "killed").glob(".step-*")) or any((root / "killed").glob("checkpoint-*"))
    assert os.waitpid(start(life, root / "killed")[0], 0)[1] == 0
    assert (root / "killed.bin").read_bytes() == (root / "whole.bin").read_bytes()
    assert not any(models.broken(path) for path in (root / "killed").glob("step-*"))
    return inside


if __name__ == "__main__":
    print(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
