"""Packing, bits per byte, the training loop and its launcher: on toy models, all on the CPU."""
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launch_toys import placed, training_spec
from shisa.config import ShisaError, file_sha256
from shisa.packing import (
    IGNORE, Packed, Pieces, Window, best_fit_decreasing, check_packed, cut, draw, encode_documents, heldout_windows, pack,
    sample_documents, score_windows, split_windows, unigram_bits_per_byte,
)
from shisa.models import last_checkpoint

BOS, EOS = 1, 2
ROOT = Path(__file__).parent.parent


def document(size: int) -> np.ndarray:
    return np.array([BOS, *(3 + np.arange(size) % 20), EOS], dtype=np.int32)


# ---- packing

@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(2, 24))
@settings(max_examples=150, deadline=None)
def test_packing_keeps_every_token_and_every_end(sizes, length):
    documents = [document(size) for size in sizes]
    packed = pack(cut(documents, length), length, pad_id=0)
    assert check_packed(packed, BOS, EOS) == len(documents)
    parts: dict[int, list[list[int]]] = {}
    for ids, lengths, owners, _ in packed.frame.iter_rows():
        for stop, size, owner in zip(np.cumsum(lengths), lengths, owners, strict=True):
            parts.setdefault(owner, []).append(ids[stop - size:stop])
    for number, whole in enumerate(documents):  # the pieces of a document hold its tokens, each once
        tokens = sorted(token for piece in parts[number] for token in piece[1:])
        assert tokens == sorted(whole[1:].tolist())
    assert packed.cut_documents == sum(len(whole) > length for whole in documents)


@given(st.lists(st.integers(1, 16), max_size=80))
def test_best_fit_fills_no_sequence_beyond_its_length(sizes):
    places = best_fit_decreasing(np.array(sizes, np.int64), 16)
    fill = np.bincount(places, weights=sizes) if sizes else []
    assert len(places) == len(sizes) and all(0 < total <= 16 for total in fill)
    assert sum(total <= 8 for total in fill) <= 1  # two half-empty sequences would have been one


def test_labels_are_the_next_token_within_a_piece_and_nothing_else():
    packed = pack(cut([document(3), document(1), document(12)], 8), 8, pad_id=0)
    for row in range(len(packed)):
        batch = {name: value[0] for name, value in packed.batch(np.array([row])).items()}
        ends = np.flatnonzero(np.diff(np.append(batch["position_ids"], 0)) != 1)
        for at, label in enumerate(batch["labels"]):
            inside = at not in ends and batch["input_ids"][at + 1] != 0
            assert label == (batch["input_ids"][at + 1] if inside else IGNORE)
    every = packed.batch(np.arange(len(packed)))["labels"]
    assert (every == EOS).sum() == 3 and not (every == BOS).any() and not (every == 0).any()


def test_a_document_without_its_end_is_found():
    for ends in (True, False):
        broken = Pieces(np.array([BOS, 5, 6], np.int32), np.array([3]), np.array([0]), np.array([ends]))
        with pytest.raises(ValueError, match="document 0"):
            check_packed(pack(broken, 8, 0), BOS, EOS)


def test_packed_file_round_trip_and_same_bytes(tmp_path):
    packed = pack(cut([document(size) for size in range(30)], 16), 16, pad_id=7, seed=3)
    packed.save(tmp_path / "a.parquet")
    again = Packed.load(tmp_path / "a.parquet")
    assert again.frame.equals(packed.frame) and (again.length, again.pad_id) == (16, 7)
    pack(cut([document(size) for size in range(30)], 16), 16, pad_id=7, seed=3).save(tmp_path / "b.parquet")
    assert file_sha256(tmp_path / "a.parquet") == file_sha256(tmp_path / "b.parquet")


def test_draw_meets_its_budget_and_counts_its_passes():
    pieces = cut([document(size) for size in (3, 5, 9)], 32)
    chosen, turns = draw(pieces.sizes, 100, seed=0)
    assert 100 <= pieces.sizes[chosen].sum() < 100 + 11
    assert len(set(zip(chosen.tolist(), turns.tolist(), strict=True))) == len(chosen) and sorted(turns) == turns.tolist()
    taken = pieces.take(chosen)
    check_packed(pack(replace(taken, documents=chosen + 3 * turns), 32, 0), BOS, EOS)
    with pytest.raises(ValueError, match="ends more than once"):
        check_packed(pack(taken, 32, 0), BOS, EOS)


# ---- a tokenizer and models to test with

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from shisa.base import base_tokenizer
    from shisa.models import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    base_tokenizer(folder)
    return load_tokenizer(folder)


def toy(vocabulary: int = 64, hidden: int = 16, seed: int = 0):
    from shisa.base import new_model

    return new_model(vocabulary, hidden, 1, 2, 64, seed)


def test_a_stop_token_written_in_a_text_stays_text(tokenizer):
    ids = encode_documents(tokenizer, ["a </s> b <s> c"])[0].tolist()
    assert ids.count(EOS) == 1 and ids[-1] == EOS and ids.count(BOS) == 1
    assert tokenizer.decode(ids[1:-1]) == "a </s> b <s> c"


# ---- bits per byte

@given(st.text(alphabet="aé日𠮷 \n", max_size=60), st.integers(4, 20))
def test_windows_are_the_text(text, size):
    windows = split_windows(text, size)
    assert "".join(window.text for window in windows) == text
    assert all(0 < len(window.text.encode()) <= size for window in windows)
    assert [window.ends for window in windows] == [False] * (len(windows) - 1) + [True] * bool(windows)


def test_bits_per_byte_is_what_the_definition_says(tokenizer):
    import torch

    model = toy(len(tokenizer)).eval()
    texts = ["A short line.", "短い文。", "The rain stopped before noon, and the path along the river was already dry."]
    bits, ends, elsewhere = 0.0, [], []
    for text in texts:
        for window in split_windows(text, 40):
            ids = tokenizer(window.text)["input_ids"] + ([EOS] if window.ends else [])
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            for at in range(1, len(ids)):
                bits -= float(logp[at - 1, ids[at]]) / math.log(2)
                (ends if ids[at] == EOS else elsewhere).append(float(logp[at - 1, EOS].exp()))
    windows = [window for text in texts for window in split_windows(text, 40)]
    for budget in (50, 4096):  # however it is batched
        scores = score_windows(model, tokenizer, windows, budget)
        assert scores.bits_per_byte == pytest.approx(bits / sum(len(t.encode()) for t in texts), rel=1e-5)
        assert scores.p_eos_ratio == pytest.approx(np.mean(ends) / np.mean(elsewhere), rel=1e-4)
        assert scores.ends == 3


def test_unigram_is_not_beaten_by_chance(tokenizer):
    texts = ["the cat sat on the mat"] * 20
    own, other = unigram_bits_per_byte(tokenizer, texts, texts, ["zzz"])
    assert own < unigram_bits_per_byte(tokenizer, ["zzz"], texts)[0] and own < other


def test_a_sample_is_the_same_however_the_table_is_cut(tmp_path):
    rows = pl.DataFrame({"id": [f"{i:03d}" for i in range(90)], "lang": ["ja", "en", "ja"] * 30, "text": [f"text {i}" for i in range(90)]})
    rows.write_parquet(tmp_path / "all.parquet")
    parts = [tmp_path / f"part-{at}.parquet" for at in range(4)]
    for path, part in zip(parts, (rows[50:], rows[:3], rows[3:4], rows[4:50]), strict=True):
        part.write_parquet(path)
    whole = sample_documents([tmp_path / "all.parquet"], 40, seed=1)
    assert sample_documents(parts, 40, seed=1).equals(whole) and not sample_documents(parts, 40, seed=2).equals(whole)
    assert whole["lang"].to_list() == ["en"] * 30 + ["ja"] * 40 and whole["id"].n_unique() == 70
    assert all(text == f"text {int(name)}" for name, text in whole.select("id", "text").iter_rows())


@pytest.mark.parametrize("trained, heldout, plain, overfits", [
    (2.0, 2.1, 1.0, False), (2.0, 2.3, 1.0, True), (2.0, 2.3, 1.1, False), (2.0, 2.1, 0.9, True)])
def test_what_is_called_overfitting(trained, heldout, plain, overfits):
    from shisa.pretrain import heldout_gap

    found = heldout_gap(trained, heldout, plain)
    assert found["overfits"] is overfits and found["gap"] == pytest.approx(heldout / trained - 1)


def test_heldout_draw_takes_from_every_source():
    rows = [{"id": f"{s}{i}", "text": "x" * 1000, "source": s, "lang": "en"} for s in "abc" for i in range(1 + 30 * (s == "a"))]
    windows = heldout_windows(pl.DataFrame(rows), cap=3000, window_bytes=100)["en"]
    assert len(windows) == 30 and windows == heldout_windows(pl.DataFrame(rows[::-1]), cap=3000, window_bytes=100)["en"]
    assert isinstance(windows[0], Window)


# ---- padding rows

def test_padding_rows_have_no_probability_and_survive_a_reload(tmp_path):
    import torch
    from shisa.base import mistral_model_file, save_spm_tokenizer
    from shisa.base import pad_pieces
    from shisa.pieces import spm_proto
    from shisa.models import load_model, load_tokenizer, pad_id, padding_ids, save_model

    proto = spm_proto(mistral_model_file())
    pad_pieces(proto)
    (tmp_path / "t.model").write_bytes(proto.SerializeToString())
    save_spm_tokenizer(tmp_path / "t.model", tmp_path / "tokenizer")
    padded = load_tokenizer(tmp_path / "tokenizer")
    assert len(padded) == 32_064 and padding_ids(padded) == list(range(32_000, 32_064)) and pad_id(padded) == 32_000
    save_model(toy(len(padded), 8), padded, tmp_path / "model")
    model = load_model(tmp_path / "model")
    with torch.no_grad():
        chances = model(torch.tensor([[1, 500, 600]])).logits.softmax(-1)
    assert chances[..., 32_000:].max() == 0 and model.generation_config.pad_token_id == 32_000
    assert load_tokenizer(tmp_path / "model").backend_tokenizer.normalizer is not None


def test_a_base_is_fetched_from_a_folder_laid_out_like_the_hub(tmp_path, tokenizer):
    from shisa.base import fetch, mistral_model_file
    from shisa.models import load_model, load_tokenizer

    hub = tmp_path / "hub"
    toy(32_000, 8).save_pretrained(hub, max_shard_size="1MB")
    assert (hub / "model.safetensors.index.json").is_file()
    (hub / "tokenizer.model").write_bytes(mistral_model_file().read_bytes())
    (hub / "pytorch_model.bin").write_bytes(b"a pickle, not to be copied")
    (hub / "tokenizer.json").write_text("{}")
    fetch(str(hub), "main", tmp_path / "model")
    assert not (tmp_path / "model" / "pytorch_model.bin").exists()
    assert load_model(tmp_path / "model").config.vocab_size == 32_000
    assert load_tokenizer(tmp_path / "model")("雨が止んだ。")["input_ids"] == tokenizer("雨が止んだ。")["input_ids"]
    with pytest.raises(ShisaError, match="holds no"):
        (tmp_path / "empty").mkdir()
        fetch(str(tmp_path / "empty"), "main", tmp_path / "other")


# ---- a softmax over some of the rows

@given(st.lists(st.integers(-1, 50), min_size=2, max_size=80).filter(lambda counts: max(counts) >= 0), st.integers(1, 100))
@settings(deadline=None)
def test_rows_are_drawn_as_often_as_they_are_frequent(counts, candidates):
    from shisa.losses import inclusion

    shown, there = inclusion(np.array(counts), candidates), sum(count >= 0 for count in counts)
    assert shown.sum() == pytest.approx(min(candidates, there)) and 0 <= shown.min() and shown.max() <= 1
    assert all((chance == 0) == (count < 0) for chance, count in zip(shown, counts, strict=True))
    order = np.argsort(counts, kind="stable")
    assert (np.diff(shown[order]) >= -1e-12).all()


@given(st.integers(2, 40), st.integers(1, 20), st.integers(0, 2**31 - 1))
@settings(deadline=None)
def test_looking_at_every_row_is_the_plain_loss(rows, tokens, seed):
    import torch
    from shisa.losses import inclusion, sampled_cross_entropy

    draw = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(tokens, 8, generator=draw), torch.randn(rows, 8, generator=draw)
    labels = torch.randint(0, rows, (tokens,), generator=draw)
    labels[::3] = IGNORE
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE, reduction="sum")
    every = sampled_cross_entropy(hidden, weight, labels, inclusion(np.arange(rows), rows), [seed])
    assert torch.isclose(plain, every, atol=1e-4)


def test_the_sum_over_drawn_rows_is_right_on_average():
    import torch
    from shisa.losses import inclusion, sampled_cross_entropy

    hidden, weight = torch.randn(61, 8, generator=torch.Generator().manual_seed(0)).split([1, 60])
    label, shown = torch.tensor([7]), inclusion(np.arange(60), 20)
    logits = (hidden @ weight.T)[0]
    sums = [float((sampled_cross_entropy(hidden, weight, label, shown, [i]) + logits[7]).exp()) for i in range(4000)]
    assert np.mean(sums) == pytest.approx(float(logits.exp().sum()), rel=0.05)


def test_some_of_the_rows_train_and_resume_and_leave_padding_alone(spec, tmp_path):
    from shisa.base import new_model
    from shisa.models import mask_padding
    from shisa.train import TrainSettings, train_lm

    packed = Packed.load(Path(spec["packed"]))
    plan = TrainSettings(**{**spec["settings"], "candidates": 500})

    def trained(folder: str):
        model = mask_padding(new_model(32_064, 8, 1, 2, 64, 0), list(range(32_000, 32_064)))
        return train_lm(model, packed, plan, tmp_path / folder)

    before = new_model(32_064, 8, 1, 2, 64, 0).state_dict()["lm_head.weight"]
    whole, again = trained("a"), trained("a")  # the second goes on from step 9
    after = whole.state["lm_head.weight"]
    assert whole.steps.equals(again.steps) and after.equal(again.state["lm_head.weight"])
    assert whole.steps["loss"][-1] < whole.steps["loss"][0] - 0.3
    assert after[32_000:].equal(before[32_000:]) and not after[:32_000].equal(before[:32_000])


def test_some_of_the_rows_want_one_process(spec, tmp_path):
    from shisa.launch import launch

    _, config = placed({**spec, "settings": {**spec["settings"], "micro_batch": 1, "candidates": 500}}, tmp_path / "two")
    with pytest.raises(ShisaError, match="candidates=500 needs one process, there are 2"):
        launch("shisa.pretrain", config, processes=2, say=lambda text: None)


# ---- killed and launched: the stage's own function in processes of its own

@pytest.fixture(autouse=True)
def one_thread_a_process(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return training_spec(tmp_path_factory.mktemp("spec"), 2)


def child(config: Path) -> subprocess.Popen:
    from shisa.launch import training_environment

    return subprocess.Popen([sys.executable, "-m", "shisa.pretrain", str(config)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                            env={**os.environ, **training_environment(), "PYTHONPATH": str(ROOT)})


def hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(spec, tmp_path):
    _, undisturbed = placed(spec, tmp_path / "a")
    own, killed = placed(spec, tmp_path / "b")
    first, second = child(undisturbed), child(killed)
    for line in second.stdout:
        if line.startswith("progress\tstep 8"):
            second.send_signal(signal.SIGKILL)
            break
    assert second.wait() == -signal.SIGKILL and first.wait() == 0
    reached = last_checkpoint(Path(own["checkpoints"]))
    assert reached.name == "step-000006" and not Path(own["output"]).exists()
    newest = Path(own["checkpoints"]) / "step-000009"  # a later one, cut off while it was written: not to be used
    newest.mkdir()
    (newest / "complete.json").write_text(json.dumps({"model.safetensors": "0" * 64}))
    assert last_checkpoint(Path(own["checkpoints"])) == reached
    third = child(killed)
    told = [line.split("\t")[2] for line in third.stdout if line.startswith("progress")]
    assert third.wait() == 0 and told[0] == "7"
    assert hashes(tmp_path / "a" / "trained") == hashes(tmp_path / "b" / "trained")


def test_a_batch_that_does_not_divide_is_refused(spec, tmp_path):
    from shisa.pretrain import train

    own, _ = placed({**spec, "settings": {**spec["settings"], "micro_batch": 3}}, tmp_path / "odd")
    with pytest.raises(ShisaError, match="not a multiple"):
        train(own)
