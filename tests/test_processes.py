"""Two CPU processes with ZeRO-3 through the same entry point as one: same losses, also after one of them was killed."""
import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import polars as pl
import pytest
from chat_toys import mistral_tokenizer, small_talks, toy_model
from shisa import dpo, sft
from shisa.chat_format import install_template
from shisa.config import ShisaError
from shisa.launch import launch
from shisa.models import load_model

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; pip install 'shisa[train]'")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = install_template(mistral_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    toy_model(folder, tokenizer)
    return folder, tokenizer


def sft_job(base):
    """Rows and settings of a fine-tuning job, without noise: each process would draw its own."""
    rows = sft.training_rows(base[1], small_talks(12))
    return "shisa.sft", rows, sft.SftSettings(learning_rate=1e-3, epochs=6, batch_size=4, micro_batch=2, neftune_alpha=0.0,
                                              warmup_share=0.1, checkpoint_every=2, seed=0)


def dpo_job(base):
    """Pairs with the reference's sums, and settings of a tuning job."""
    folder, tokenizer = base
    pairs = [{"prompt": talk[:1], "chosen": talk[1:], "rejected": [{"role": "assistant", "content": "知りません。"}]}
             for talk in small_talks(12)]
    rows = dpo.pair_rows(tokenizer, pairs, 256)
    rows = [{**row, **sums} for row, sums in zip(rows, dpo.reference_sums(load_model(folder), rows))]
    return "shisa.dpo", rows, dpo.DpoSettings(learning_rate=1e-3, epochs=6, batch_size=4, micro_batch=2, beta=0.1,
                                              warmup_share=0.1, checkpoint_every=2, seed=0)


def workers(config: Path) -> list[int]:
    """Process ids of the training processes of a job, by their command lines."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(config) in words and "accelerate.commands.launch" not in words:
            found.append(int(entry.parent.name))
    return found


def kill_after(config: Path, mark: str) -> None:
    """SIGKILL one training process as soon as a checkpoint is complete."""
    stop = time.time() + 240
    while not list((config.parent / "checkpoints").glob(mark)) and time.time() < stop:
        time.sleep(0.02)
    os.kill(max(workers(config)), signal.SIGKILL)


def job(base, folder: Path, rows, settings) -> dict:
    """A job in a folder of its own, as a stage describes it."""
    folder.mkdir()
    pl.DataFrame(rows).write_parquet(folder / "rows.parquet")
    described = {"model": str(base[0]), "rows": str(folder / "rows.parquet"), "out": str(folder), "done": "steps.parquet",
                 "checkpoints": str(folder / "checkpoints"), "settings": dataclasses.asdict(settings)}
    (folder / "job.json").write_text(json.dumps(described))
    return described


def as_alone(tmp_path: Path, steps: int) -> None:
    """What two processes left is what one left: losses, names and weights."""
    ours, theirs = (pl.read_parquet(tmp_path / name / "steps.parquet") for name in ("alone", "two"))
    assert ours["step"].to_list() == theirs["step"].to_list() and len(ours) == steps
    assert theirs["loss"].to_list() == pytest.approx(ours["loss"].to_list(), abs=2e-5)
    one, two = (dict(load_model(tmp_path / name / "model").named_parameters()) for name in ("alone", "two"))
    assert one.keys() == two.keys() and all((one[name] - two[name]).abs().max() < 1e-3 for name in one)


def test_adapters_with_zero3(base, tmp_path):
    module, rows, settings = sft_job(base)
    settings = dataclasses.replace(settings, lora_rank=4, learning_rate=1e-2, epochs=2)
    sft.main(job(base, tmp_path / "alone", rows, settings))
    job(base, tmp_path / "two", rows, settings)
    launch(module, tmp_path / "two" / "job.json", processes=2, zero3=True, say=lambda text: None)
    as_alone(tmp_path, 6)
    before, after = (dict(load_model(folder).named_parameters()) for folder in (base[0], tmp_path / "two" / "model"))
    assert {name for name in before if not before[name].equal(after[name])} == {name for name in before if "proj" in name}


@pytest.mark.parametrize("make", [sft_job, dpo_job])
def test_two_processes_with_zero3(base, tmp_path, make):
    module, rows, settings = make(base)
    alone = job(base, tmp_path / "alone", rows, settings)
    {"shisa.sft": sft, "shisa.dpo": dpo}[module].main(alone)
    job(base, tmp_path / "two", rows, settings)
    config = tmp_path / "two" / "job.json"
    killer = threading.Thread(target=kill_after, args=(config, "step-000002"))
    killer.start()
    with pytest.raises(ShisaError):
        launch(module, config, processes=2, zero3=True, say=lambda text: None)
    killer.join()
    assert not workers(config) and not (tmp_path / "two" / "steps.parquet").exists()
    with pytest.raises(ShisaError, match="processes: 2 -> 1"):
        {"shisa.sft": sft, "shisa.dpo": dpo}[module].main(json.loads(config.read_text()))
    launch(module, config, processes=2, zero3=True, say=lambda text: None)
    as_alone(tmp_path, 18)
