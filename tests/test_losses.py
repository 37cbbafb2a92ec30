"""Losses over a large vocabulary beside the plain one, documents kept apart, and what follows and stops a training: toy models."""
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoints import packed_toy, toy

from shisa.config import ShisaError
from shisa.losses import chunked_cross_entropy, liger_cross_entropy, loss_module
from shisa.packing import IGNORE, Packed, Window, cut, encode_documents, pack, score_windows
from shisa.train import Follow, TrainSettings, train_lm


def parts(tokens: int, rows: int, seed: int, dtype: str = "float32", device: str = "cpu"):
    """Hidden states, output rows and labels, some of them `IGNORE`; the last three rows are padding, none of them a label."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(tokens, 24, generator=draw), torch.randn(rows, 24, generator=draw)
    labels = torch.randint(0, rows - 3, (tokens,), generator=draw)
    labels[::3] = IGNORE
    kind = getattr(torch, dtype)
    return hidden.to(device, kind).requires_grad_(), weight.to(device, kind).requires_grad_(), labels.to(device), [rows - 3, rows - 2, rows - 1]


def plain_loss(hidden, weight, labels, padding):
    import torch

    logits = hidden @ weight.T
    logits[:, padding] = torch.finfo(logits.dtype).min / 4
    return torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")


def gradients(loss, inputs):
    import torch

    return [grad.double() for grad in torch.autograd.grad(loss * 0.37, inputs)]


@given(st.integers(1, 40), st.integers(4, 60), st.integers(0, 50), st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=60)
def test_chunked_is_the_plain_loss_with_the_plain_gradients(tokens, rows, size, seed):
    import torch

    hidden, weight, labels, padding = parts(tokens, rows, seed)
    plain, chunked = plain_loss(hidden, weight, labels, padding), chunked_cross_entropy(hidden, weight, labels, padding, size)
    assert torch.isclose(plain, chunked, rtol=1e-5, atol=1e-4)
    for ours, wanted in zip(gradients(chunked, (hidden, weight)), gradients(plain, (hidden, weight)), strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-5)
    assert not gradients(chunked_cross_entropy(hidden, weight, labels, padding, size), (hidden, weight))[1][padding].any()


@pytest.mark.parametrize("autocast", [True, False])
def test_chunked_in_bfloat16_is_as_near_to_the_truth_as_plain_is(autocast):
    import torch

    exact = parts(512, 400, 5, "float64")
    truth = plain_loss(*exact)
    right = gradients(truth, exact[:2])

    def errors(loss_of) -> list[float]:
        own = parts(512, 400, 5, "float32" if autocast else "bfloat16")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(*own)
        got = gradients(loss, own[:2])
        return [abs(float(loss - truth) / float(truth)), *(float((a - b).norm() / b.norm()) for a, b in zip(got, right, strict=True))]

    for size in (16, 512):  # many chunks lose nothing: their sum is in 32 bits
        for ours, plain in zip(errors(lambda *p, size=size: chunked_cross_entropy(*p, size)), errors(plain_loss), strict=True):
            assert ours < max(1.1 * plain, 1e-4) and ours < 0.02


def test_liger_is_refused_where_it_cannot_run():
    hidden, weight, labels, padding = parts(6, 9, 0)
    with pytest.raises(ShisaError, match="loss liger: its kernels need a GPU; choose loss chunked"):
        liger_cross_entropy(hidden, weight, labels, padding)


def on_gpu(package: str):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_liger_is_the_plain_loss_with_the_plain_gradients(dtype):
    on_gpu("liger_kernel")
    hidden, weight, labels, padding = parts(512, 400, 5, dtype, "cuda")
    plain, fused = plain_loss(hidden, weight, labels, padding), liger_cross_entropy(hidden, weight, labels, padding)
    near = 1e-4 if dtype == "float32" else 0.02
    assert abs(float(plain - fused) / float(plain)) < near
    for ours, wanted in zip(gradients(fused, (hidden, weight)), gradients(plain, (hidden, weight)), strict=True):
        assert float((ours - wanted).norm() / wanted.norm()) < near


# ---- the same training, however it is computed

PLAN = TrainSettings(steps=8, batch=4, micro_batch=2, learning_rate=1e-2, warmup=2, checkpoint_every=100)


@pytest.mark.parametrize("change", [{"loss": "chunked"}, {"gradient_checkpointing": True}, {"loss": "chunked", "gradient_checkpointing": True}])
def test_numeric_settings_change_a_training_by_rounding_alone(change, tmp_path):
    import torch

    from shisa.models import mask_padding

    def trained(plan, name):
        return train_lm(mask_padding(toy(), [61, 62, 63]), packed_toy(), plan, tmp_path / name)

    before, plain, other = toy().state_dict(), trained(PLAN, "plain"), trained(replace(PLAN, **change), "other")
    assert np.allclose(plain.steps["loss"], other.steps["loss"], atol=1e-5)
    assert all(torch.allclose(plain.state[name], other.state[name], atol=1e-4) for name in plain.state)
    for run in (plain, other):
        assert run.state["lm_head.weight"][61:].equal(before["lm_head.weight"][61:])
        assert not run.state["lm_head.weight"][:61].equal(before["lm_head.weight"][:61])


def test_rows_laid_end_to_end_for_flash_attention_give_the_same_loss():
    import torch
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    batch = {name: torch.from_numpy(value) for name, value in packed_toy().batch(np.arange(4)).items()}
    model = toy().eval()
    with torch.no_grad():
        apart, flat = (float(loss_module(model, "plain", kind)(**batch)) for kind in ("sdpa", "flash_attention_2"))
    assert apart == pytest.approx(flat, rel=1e-5)
    # what the two would be if documents saw each other, and why flash attention must not get two rows
    with torch.no_grad():
        blind = float(loss_module(model)(**batch | {"position_ids": torch.arange(32).repeat(4, 1)}))
    assert abs(blind - apart) > 1e-3
    assert _is_packed_sequence(batch["position_ids"].reshape(1, -1), 1) and not _is_packed_sequence(batch["position_ids"], 4)


def worst_difference(model, packed: Packed, rows: list[int]) -> float:
    """Largest difference between the logits of packed pieces and those of the same pieces, read one at a time."""
    import torch

    worst = 0.0
    for row in rows:
        batch = {name: torch.from_numpy(value).to(model.device) for name, value in packed.batch(np.array([row])).items()}
        with torch.no_grad():
            together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
            start = 0
            for size in packed.frame["lengths"][row].to_list():
                alone = model(input_ids=batch["input_ids"][:, start:start + size], use_cache=False).logits[0]
                worst, start = max(worst, float((together[start:start + size] - alone).abs().max())), start + size
    return worst


def tiny_model_and_data(run: Path):
    from shisa.models import load_model
    from shisa.stage import Artifact

    packed = Packed.load(Artifact(run / "30_mix").shards("packed"))
    fullest = packed.frame["lengths"].list.len().arg_sort(descending=True).to_list()
    return load_model(Artifact(run / "23_embeddings").folder("model")).eval(), packed, fullest[:4]


def test_packed_documents_of_tiny_do_not_see_each_other(finished_run):
    model, packed, rows = tiny_model_and_data(finished_run)
    assert len(packed.frame["lengths"][rows[0]]) > 1
    assert worst_difference(model, packed, rows) < 1e-4


def test_packed_documents_do_not_see_each_other_under_flash_attention(finished_run):
    on_gpu("flash_attn")
    import torch

    model, packed, rows = tiny_model_and_data(finished_run)
    model = model.to("cuda", torch.bfloat16)
    model.set_attn_implementation("flash_attention_2")
    assert worst_difference(model, packed, rows) < 0.1  # bfloat16


# ---- who follows a training, and what stops it

def spec_of(folder: Path, **changes) -> dict:
    """A toy model and packed file, as 31_pretrain's `train` wants them, watched on two windows."""
    from shisa.base import base_tokenizer, new_model
    from shisa.models import load_tokenizer, save_model

    base_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    save_model(new_model(len(tokenizer), 8, 1, 2, 64, 0), tokenizer, folder / "model")
    pack(cut(encode_documents(tokenizer, [f"Number {i} comes after {i - 1}." for i in range(60)]), 32), 32, 0).save(folder / "packed.parquet")
    windows = {"en": [["Number 7 comes after 6.", True]], "code": [["print(7)", True]]}
    watch = {"every": 2, "windows": windows, "base": {"en": 1.0, "code": 1.0}, "stop": {"english": 0, "loss": 0}, "warmup_share": 0.2}
    (folder / "watch.json").write_text(json.dumps({**watch, **changes.pop("watch", {})}))
    plan = {"steps": 6, "batch": 4, "micro_batch": 4, "learning_rate": 1e-2, "checkpoint_every": 2, "warmup": 1}
    return {"model": str(folder / "model"), "packed": str(folder / "packed.parquet"), "settings": plan, "checkpoints": str(folder / "kept"),
            "output": str(folder / "trained"), "watch": str(folder / "watch.json"), "log": str(folder / "logs" / "log.jsonl"), **changes}


def test_watched_windows_stand_in_the_log_the_steps_and_the_tracker(tmp_path, monkeypatch):
    from accelerate.tracking import GeneralTracker

    from shisa import pretrain
    from shisa.models import load_model, load_tokenizer

    class Seen(GeneralTracker):
        name, requires_logging_directory, main_process_only = "seen", False, True

        def __init__(self):
            super().__init__()
            self.lines: list[dict] = []

        tracker = property(lambda self: self)

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step=None, **more):
            self.lines.append(dict(values))

    seen, asked = Seen(), []
    monkeypatch.setattr(pretrain, "trackers", lambda name: asked.append(name) or [seen])
    spec = spec_of(tmp_path, report_to="tensorboard")
    pretrain.train(spec)
    assert asked == ["tensorboard"] and seen.config["learning_rate"] == 1e-2
    steps = pl.read_parquet(tmp_path / "trained" / "steps.parquet")
    lines = [json.loads(line) for line in Path(spec["log"]).read_text().splitlines()]
    assert lines[0]["event"] == "starts" and [line["step"] for line in lines[1:]] == list(range(1, 7))
    assert {"seconds", "tokens_per_second"} <= set(lines[1]) and not {"seconds", "time"} & set(steps.columns)
    assert steps["bits_en"].is_null().to_list() == [True, False] * 3 and steps["loss"].to_list() == [line["loss"] for line in seen.lines]
    folder = tmp_path / "trained" / "model"
    last = score_windows(load_model(folder), load_tokenizer(folder), [Window("Number 7 comes after 6.", True)]).bits_per_byte
    assert steps["bits_en"][-1] == pytest.approx(last, rel=1e-6) == lines[-1]["bits_en"] == seen.lines[-1]["bits_en"]


def test_a_run_that_forgets_english_is_stopped_and_stays_stopped(tmp_path):
    from shisa.pretrain import train

    spec = spec_of(tmp_path, watch={"stop": {"english": 1.25, "loss": 0}})
    for _ in range(2):  # run again, it stops again, at the same step
        with pytest.raises(ShisaError, match=r"stopped at step 2: English is at .* bits per byte, .* times the base's 1.000; lower learning_rate"):
            train(spec)
    assert not Path(spec["output"]).exists() and not list(Path(spec["checkpoints"]).glob("step-*"))
    assert len(Path(spec["log"]).read_text().splitlines()) == 6  # twice: a start and two steps


def test_what_stops_a_training():
    from shisa.pretrain import BLOCK, check_training

    watch = {"stop": {"english": 1.1, "loss": 1.2}, "base": {"en": 2.0}, "warmup_share": 0.1}

    def log(losses, english=None):
        rows = [{"step": at + 1, "loss": loss} for at, loss in enumerate(losses)]
        return [*rows[:-1], {**rows[-1], "bits_en": english}] if english else rows

    check_training(log([3.0] * 11, 2.19), watch, 100)
    check_training(log([3.0] * 10, 2.3), watch, 100)  # within the warm-up
    with pytest.raises(ShisaError, match="step 11: English is at 2.210"):
        check_training(log([3.0] * 11, 2.21), watch, 100)
    check_training(log([3.0] * BLOCK + [9.0] * (BLOCK - 1)), watch, 100)  # a block is not full
    check_training(log([9.0] * BLOCK + [3.0] * BLOCK), watch, 100)
    with pytest.raises(ShisaError, match=f"step {3 * BLOCK}: the mean loss of {BLOCK} steps is 3.700, and was 3.000; lower learning_rate"):
        check_training(log([9.0] * BLOCK + [3.0] * BLOCK + [3.7] * BLOCK), watch, 100)
    check_training(log([3.0] * BLOCK + [9.0] * BLOCK, 9.0), {**watch, "stop": {"english": 0, "loss": 0}}, 100)


def test_kinds_of_watched_text_come_from_the_documents():
    from shisa.pretrain import watch_windows

    rows = [("ja", "web", None), ("en", "web", None), ("en", "sample/code", "code"), ("ja", "maths_book", None), ("ja", "sample/tale", "tale")]
    frame = pl.DataFrame([{"id": str(at), "text": f"text {at} " * 9, "lang": lang, "source": source, "meta": json.dumps({"kind": kind})}
                          for at, (lang, source, kind) in enumerate(rows)])
    found = watch_windows(frame, {"math": ["maths"]}, 4096, 512)
    assert {kind: sorted(w.text[:6] for w in windows) for kind, windows in found.items()} == {
        "ja": ["text 0", "text 4"], "en": ["text 1"], "code": ["text 2"], "math": ["text 3"]}


def test_trackers_are_off_and_refused_without_package_or_key(monkeypatch):
    from shisa import pretrain

    assert pretrain.config("a100x16").report_to == "none" and pretrain.trackers("none") == []
    monkeypatch.setattr(pretrain, "find_spec", lambda name: None)
    with pytest.raises(ShisaError, match="report_to trackio: not installed; pip install trackio"):
        pretrain.trackers("trackio")
    monkeypatch.setattr(pretrain, "find_spec", lambda name: name)
    assert pretrain.trackers("tensorboard") == ["tensorboard"]
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ShisaError, match="WANDB_API_KEY is not in the environment"):
        pretrain.trackers("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "of the environment")
    assert pretrain.trackers("wandb") == ["wandb"]


def test_the_recipe_is_stated_whole_with_sources():
    from shisa.pretrain import config, recipe

    lines = {line["setting"]: line for line in recipe()}
    assert all(line["source"] and line[profile] for line in lines.values() for profile in ("tiny", "small", "h100", "a100x16"))
    assert lines["tokens a step"]["a100x16"] == "1,048,576" and lines["steps, about"]["a100x16"] == "7,629"
    assert lines["peak rate"]["a100x16"] == f"{1e-4 * (256 / 1024) ** 0.5:g}" == f"{config('a100x16').learning_rate:g}"


def test_who_follows_may_measure_nothing(tmp_path):
    trained = train_lm(toy(), packed_toy(), replace(PLAN, steps=2), tmp_path, follow=Follow(every=1))
    assert trained.steps.columns == ["step", "loss", "learning_rate", "grad_norm", "tokens"]
