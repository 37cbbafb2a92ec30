"""Checkpoints: whole or not there, resumed to the same bytes, and never from something else. Toy models, one process."""
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chat_toys import lives
from shisa.config import ShisaError, fingerprint
from shisa.models import last_checkpoint
from shisa.packing import Packed, cut, pack
from shisa.train import Follow, TrainSettings, train_lm

PLAN = TrainSettings(steps=30, batch=4, micro_batch=2, learning_rate=1e-2, warmup=4, checkpoint_every=1, seed=3)
LATER = replace(PLAN, checkpoint_every=1000)  # how often to save is not part of what is trained


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def toy(seed: int = 0, hidden: int = 16):
    from shisa.base import new_model

    return new_model(64, hidden, 1, 2, 64, seed)


def packed_toy(seed: int = 0) -> Packed:
    random = np.random.default_rng(seed)
    documents = [np.array([1, *random.integers(3, 60, size), 2], np.int32) for size in random.integers(2, 40, 60)]
    return pack(cut(documents, 32), 32, pad_id=0)


def in_bytes(trained) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in sorted(trained.state.items())})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One undisturbed run: its bytes and steps, and a copy of the checkpoint after each of its steps."""
    folder = tmp_path_factory.mktemp("saved")

    def keep(text: str, done: float, total: float) -> None:  # told before a step is saved: copies the one before
        if (made := folder / "run" / f"step-{int(done) - 1:06d}").is_dir():
            shutil.copytree(made, folder / "all" / made.name)

    trained = train_lm(toy(), packed_toy(), PLAN, folder / "run", keep)
    assert len(list((folder / "all").iterdir())) == 29
    return folder / "all", in_bytes(trained), trained.steps


def test_resumed_from_every_step_of_a_run_gives_the_same_bytes(saved, tmp_path):
    checkpoints, wanted, steps = saved
    for number in range(1, 30):
        scratch = tmp_path / str(number)
        shutil.copytree(checkpoints / f"step-{number:06d}", scratch / f"step-{number:06d}")
        told: list[float] = []
        again = train_lm(toy(seed=9), packed_toy(), LATER, scratch, lambda text, done, total, told=told: told.append(done))
        assert told[0] == number + 1 and in_bytes(again) == wanted and again.steps.equals(steps), number
        shutil.rmtree(scratch)


def two(saved, folder: Path) -> Path:
    """The last two checkpoints of the run, as they lie in its folder."""
    for name in ("step-000024", "step-000029"):
        shutil.copytree(saved[0] / name, folder / name)
    return folder


def damage(path: Path, how: str) -> None:
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def test_each_file_damaged_in_turn_falls_back_or_refuses(saved, tmp_path, capfd):
    names = sorted(str(p.relative_to(saved[0] / "step-000029")) for p in (saved[0] / "step-000029").rglob("*") if p.is_file())
    assert {"complete.json", "log.json", "model.safetensors", "optimizer.bin"} <= set(names)
    for at, name in enumerate(names):
        for how in ("deleted", "truncated", "one bit changed"):
            folder, said = two(saved, tmp_path / f"{at}-{how}"), []
            damage(folder / "step-000029" / name, how)
            assert last_checkpoint(folder, said.append) == folder / "step-000024", (name, how)
            assert len(said) == 1 and "set aside, going on from step-000024" in said[0]
            assert (folder / "broken-step-000029").is_dir() and not (folder / "step-000029").exists()
            damage(folder / "step-000024" / name, how)
            with pytest.raises(ShisaError, match="no checkpoint is whole .*step-000024.*delete the folder to train from the start"):
                last_checkpoint(folder)
            with pytest.raises(ShisaError, match="no checkpoint is whole") as refused:
                train_lm(toy(), packed_toy(), LATER, folder)
            assert "\n" not in str(refused.value)
            shutil.rmtree(folder)
    folder = two(saved, tmp_path / "whole")
    damage(folder / "step-000029" / "optimizer.bin", "truncated")
    again = train_lm(toy(), packed_toy(), LATER, folder, follow=Follow(log=tmp_path / "log.jsonl"))
    assert in_bytes(again) == saved[1] and again.steps.equals(saved[2])
    assert "optimizer.bin is cut off or changed; set aside" in capfd.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert "set aside" in lines[0]["warning"] and lines[1]["event"] == "goes on" and lines[1]["step"] == 24
    assert [line["step"] for line in lines[2:]] == [25, 26, 27, 28, 29, 30]


def test_nothing_but_what_a_checkpoint_was_made_from_goes_on_from_it(saved, tmp_path):
    folder = two(saved, tmp_path / "run")
    changes = {"seed": replace(LATER, seed=4), "micro_batch": replace(LATER, micro_batch=4),
               "batch": replace(LATER, batch=2), "learning_rate": replace(LATER, learning_rate=2e-2), "steps": replace(LATER, steps=40),
               "loss": replace(LATER, loss="chunked"), "gradient_checkpointing": replace(LATER, gradient_checkpointing=True)}
    for name, plan in changes.items():
        with pytest.raises(ShisaError, match=rf"step-000029: made from something else \(settings.{name}: .* -> .*\); restore that") as refused:
            train_lm(toy(), packed_toy(), plan, folder)
        assert "\n" not in str(refused.value)
    with pytest.raises(ShisaError, match=r"made from something else \(data: "):
        train_lm(toy(), packed_toy(seed=1), LATER, folder)
    with pytest.raises(ShisaError, match=r"made from something else \(weights: "):
        train_lm(toy(hidden=32), packed_toy(), LATER, folder)
    record = folder / "step-000029" / "complete.json"
    written = json.loads(record.read_text())
    made = written["made_from"]
    others = {"processes: 8 -> 1": {**made, "processes": 8}, "sharded: True -> False": {**made, "sharded": True},
              "settings.dtype: bfloat16 -> float32": {**made, "settings": {**made["settings"], "dtype": "bfloat16"}}}
    for difference, other in others.items():  # an accelerator of another kind cannot be had in this process
        told = {"files": written["files"], "made_from": other}
        record.write_text(json.dumps({**told, "sha256": fingerprint(told)}))
        with pytest.raises(ShisaError, match=rf"made from something else \({difference}\); restore that"):
            train_lm(toy(), packed_toy(), LATER, folder)
    assert not list(folder.glob("broken-*"))


def test_an_unknown_loss_or_kernel_is_refused(tmp_path):
    with pytest.raises(ShisaError, match="unknown loss 'fused'; choose plain, chunked or liger"):
        train_lm(toy(), packed_toy(), replace(LATER, loss="fused"), tmp_path)
    with pytest.raises(ShisaError, match="attention flash_attention_3: .*; choose sdpa"):
        train_lm(toy(), packed_toy(), replace(LATER, attention="flash_attention_3"), tmp_path)


def life(folder: Path, told) -> bytes:
    """The training that lives.py kills."""
    return in_bytes(train_lm(toy(), packed_toy(), PLAN, folder, lambda *step: told()))


def test_killed_at_ten_random_moments_some_inside_a_save_gives_the_same_bytes(tmp_path):
    assert lives("test_checkpoints", tmp_path, kills=10) >= 2
