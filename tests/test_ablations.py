"""Ablations: arms share what they may and nothing else, a killed arm goes on to the same bits, intervals are scipy's."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shisa import ablations, claims, pipeline
from shisa.ablations import ABLATIONS, BASE, BASELINE, AblationConfig, Arm, Bench, Tuning, flops_per_token, same_text
from shisa.base import new_model
from shisa.claims import Claim, judge, paired, plot, summary, verdict
from shisa.config import ShisaError
from shisa.packing import cut, pack
from shisa.train import TrainSettings, train_lm

ROOT = Path(__file__).resolve().parents[1]
FEW = AblationConfig(steps=4, seeds=2, heldout_bytes=1_500, epochs=1)


# ---- what a packed sequence is


def seen_by_the_model(packed, tmp_path, apart: bool):
    """The model of a toy training, and what its first forward pass was given."""
    model, given = new_model(40, 16, 2, 2, 32, 0), []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    plan = TrainSettings(steps=1, batch=1, micro_batch=1, learning_rate=0.0, warmup=1, documents_apart=apart)
    train_lm(model, packed, plan, tmp_path / str(apart))
    hook.remove()
    return model.cpu(), {name: value.cpu() if hasattr(value, "cpu") else value for name, value in given[0].items()}


def test_documents_apart_or_one_text_as_the_attention_sees_it(tmp_path):
    rng = np.random.default_rng(0)
    documents = [np.array([1, *rng.integers(3, 40, size), 2], np.int32) for size in (9, 12)]
    packed = pack(cut(documents, 32), 32, 0)
    ids = torch.from_numpy(packed.batch(np.array([0]))["input_ids"])
    sizes = packed.frame["lengths"][0].to_list()
    assert len(sizes) == 2
    logits = {}
    for apart in (True, False):
        model, given = seen_by_the_model(packed, tmp_path, apart)
        with torch.no_grad():
            logits[apart] = model(**given).logits[0]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=part, use_cache=False).logits[0] for part in ids[:, :sum(sizes)].split(sizes, 1)])
        whole = model(input_ids=ids, use_cache=False).logits[0]
    length = sum(sizes)
    assert torch.allclose(logits[True][:length], alone, atol=1e-5)
    assert torch.allclose(logits[False], whole, atol=1e-5)
    assert (logits[True][:sizes[0]] - logits[False][:sizes[0]]).abs().max() < 1e-5  # the first document sees nobody either way
    assert (logits[True][sizes[0]:length] - logits[False][sizes[0]:length]).abs().max() > 1e-3


# ---- the bench


@pytest.fixture(scope="module")
def bench(finished_run, tmp_path_factory):
    """A bench of four steps an arm beside a copy of the whole run's stages, whose bases are trained for three steps."""
    out = tmp_path_factory.mktemp("ablations")
    for name in ("14_split", "20_base", "21_tokenizer", "30_mix", "43_sft_data"):
        os.symlink(finished_run / name, out / name)
    found = Bench("tiny", out, FEW)
    found.shape = found.shape.change(steps=3)
    return found


def test_a_seed_has_one_base_and_seed_0_has_the_runs(bench):
    first, second = bench.base(0), bench.base(1)
    assert first == bench.start.folder("model") and second == bench.base(1) != first
    weights = [ablations.load_model(folder).state_dict() for folder in (first, second)]
    assert {name: w.shape for name, w in weights[0].items()} == {name: w.shape for name, w in weights[1].items()}
    assert not torch.equal(weights[0]["lm_head.weight"], weights[1]["lm_head.weight"])
    assert not list(bench.folder.glob("checkpoints-base*"))


@pytest.mark.parametrize("english", [0.0, 0.25])
def test_a_mix_has_the_english_it_was_asked_for_and_the_steps_of_all(bench, english):
    packed = bench.mix(0, english)
    assert len(packed) == FEW.steps * bench.recipe.batch
    units = pl.concat([pl.read_parquet(path) for path in sorted((bench.folder / "tokens").glob("units-*.parquet"))])
    pieces = packed.frame.select(pl.col("lengths", "documents").explode())
    shares = units["share"].gather(pieces["documents"] % len(units))
    found = pieces["lengths"].filter(shares == "en").sum() / pieces["lengths"].sum()
    assert found == (0 if not english else pytest.approx(english, abs=0.13))  # a piece is up to an eighth of so short a mix
    other = bench.mix(1, english)
    assert not packed.frame["input_ids"].equals(other.frame["input_ids"])


def test_an_arm_is_trained_once_for_all_studies_and_only_what_it_names_differs(bench, monkeypatch):
    base, first = bench.result(BASE, 0), bench.result(BASELINE, 0)
    assert first["steps"] == FEW.steps and first["seconds"] >= 0 and (bench.folder / "baseline-0").is_dir()
    assert first["ja"] < first["ja at 0"] < base["ja"]  # the extension alone saves tokens, the counts more, training more
    one = bench.result(ABLATIONS["masking"].arms[1], 0)
    assert (one["steps"], one["tokens"], one["TFLOPs"]) == (first["steps"], first["tokens"], first["TFLOPs"]) and one["ja"] != first["ja"]
    again = Bench("tiny", bench.out, FEW)
    assert again.folder == bench.folder
    monkeypatch.setattr(ablations, "train_arm", lambda *_: pytest.fail("trained again"))
    assert again.result(BASELINE, 0) == first
    other = Bench("tiny", bench.out, FEW.change(steps=5))
    assert other.folder != bench.folder and Bench("tiny", bench.out, FEW.change(seeds=3)).folder == bench.folder


def test_the_same_learning_rate_is_the_baseline_and_another_is_not(bench):
    first = bench.result(BASELINE, 0)
    same, higher = (bench.result(Arm(f"rate {rate}", rate=rate), 0) for rate in (1.0, 3.0))
    assert (same["ja"], same["en"]) == (first["ja"], first["en"])  # the same arm under another name: the same bits
    assert higher["ja"] != first["ja"]


def test_equal_text_is_the_text_and_equal_flops_the_flops(bench):
    packed, first = bench.mix(0, bench.own.english), bench.result(BASELINE, 0)
    again = same_text(packed, bench.new, bench.old)

    def letters(tokenizer, sequences):  # how often each byte is written, spaces and special tokens left out
        counts, found = sequences.count_ids(len(tokenizer)), np.zeros(256, int)
        for index in np.flatnonzero(counts):
            token = tokenizer.convert_ids_to_tokens(int(index))
            if token not in tokenizer.all_special_tokens:
                spelt = bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode()
                found += np.bincount(list(spelt), minlength=256) * counts[index]
        return found[33:].tolist()

    assert letters(bench.new, packed) == letters(bench.old, again)
    text, flops = (bench.result(Arm(equal, begin="base", equal=equal), 0) for equal in ("text", "FLOPs"))
    assert text["steps"] == len(again) // bench.recipe.batch > first["steps"]
    assert text["tokens"] > first["tokens"]  # the same text, in more tokens
    step = flops["TFLOPs"] / flops["steps"]
    assert first["TFLOPs"] - step < flops["TFLOPs"] <= first["TFLOPs"]
    model = ablations.load_model(bench.base(0))
    assert step == pytest.approx(bench.recipe.batch * packed.length * flops_per_token(model, bench.recipe.candidates) / 1e12)


KILLED = """
import sys, pathlib
from shisa.ablations import Arm, AblationConfig, Bench
bench = Bench("tiny", pathlib.Path(sys.argv[1]), AblationConfig(steps=12, seeds=2, heldout_bytes=1_500, epochs=1))
print("folder", bench.folder, flush=True)
bench.result(Arm("one text", apart=False), 0)
"""


def test_an_arm_killed_in_training_goes_on_to_the_same_bits(bench):
    """SIGKILL after a checkpoint; then the arm goes on, and ends as one that nobody disturbed."""
    own = FEW.change(steps=12)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    worker = subprocess.Popen([sys.executable, "-c", KILLED, str(bench.out)], cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
                              stdout=subprocess.PIPE, text=True)
    try:
        folder = Path(worker.stdout.readline().split(maxsplit=1)[1].strip())
        deadline = time.monotonic() + 240
        while not list(folder.glob("checkpoints-*/trained/step-*")):
            assert worker.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        worker.send_signal(signal.SIGKILL)
    finally:
        worker.kill()
        worker.wait()
    assert not list(folder.glob("one-text*.json"))
    arm, found = Arm("one text", apart=False), Bench("tiny", bench.out, own)
    assert found.folder == folder
    gone_on = found.result(arm, 0)
    assert not list(folder.glob("checkpoints-*"))
    undisturbed = found.result(replace(arm, name="undisturbed"), 0)
    assert [gone_on[name] for name in ("ja", "en", "steps", "tokens")] == [undisturbed[name] for name in ("ja", "en", "steps", "tokens")]


def test_fine_tuning_arms_are_judged_on_held_out_replies(bench, monkeypatch):
    sft = ablations.module_of("51_sft")
    small = sft.config("tiny").change(batch_size=64, micro_batch=64, family_repeats=1, max_length=160)
    monkeypatch.setattr(sft, "config", lambda profile: small)
    bench.result(BASELINE, 0)
    rows = {arm.more: bench.result(arm, 0) for arm in (Tuning("once"), Tuning("then all", more="all"))}
    assert 0 < rows["all"]["replies"] < 12 and 0 < rows["all"]["family"] < rows[""]["family"]  # one more epoch of few steps still learns
    assert rows["all"]["steps"] == rows[""]["steps"] + rows["all"]["Japanese rows"] // 64


def test_a_run_whose_base_comes_from_the_hub_is_refused(bench, tmp_path):
    for name in ("14_split", "21_tokenizer", "30_mix"):
        os.symlink((bench.out / name).resolve(), tmp_path / name)
    shutil.copytree(bench.out / "20_base", tmp_path / "20_base")
    path = tmp_path / "20_base" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["source"] = "hub"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ShisaError, match="use --profile small or h100"):
        Bench("a100x16", tmp_path)


# ---- what three seeds say

FRACTIONS = st.lists(st.tuples(st.floats(0.5, 5), st.floats(0.5, 5)), min_size=2, max_size=8)


@given(FRACTIONS)
@settings(deadline=None)
def test_intervals_are_those_of_scipy(pairs):
    arm, against = zip(*pairs, strict=True)
    found = paired(arm, against)
    each = [100 * (a / b - 1) for a, b in pairs]
    assert found["each"] == pytest.approx(each) and found["mean"] == pytest.approx(np.mean(each), abs=1e-9)
    if np.std(each) > 1e-6:
        low, high = stats.ttest_1samp(each, 0).confidence_interval(0.95)
        assert (found["low"], found["high"]) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_three_seeds_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    true, covered = 2.0, 0
    for _ in range(2_000):
        found = paired(1 + (true + rng.normal(0, 1, 3)) / 100, np.ones(3))
        covered += found["low"] <= true <= found["high"]
    assert 0.935 < covered / 2_000 < 0.965


def test_one_seed_has_no_interval():
    with pytest.raises(ShisaError, match="two seeds or more of both arms, not 1 and 1"):
        paired([1.0], [1.0])
    with pytest.raises(ShisaError, match="not 3 and 2"):
        paired([1.0] * 3, [1.0] * 2)


@given(st.floats(-5, 5), st.floats(0.001, 5), st.floats(-3, 3))
def test_a_verdict_and_its_mirror_agree(low, width, limit):
    above, below = (Claim("", "", "", "", side, limit=sign * limit) for side, sign in (("above", 1), ("below", -1)))
    found = verdict(above, low, low + width)
    assert found == verdict(below, -low - width, -low)
    assert found == ("supports" if low > limit else "refutes" if low + width < limit else "cannot tell")


def toy_rows():
    return [{"arm": arm, "seed": seed, "ja": 2.0 * factor + 0.1 * seed, "steps": 5, "seconds": 7 + seed, "CPU seconds": 9}
            for arm, factor in (("baseline", 1.0), ("worse", 1.1), ("level", 1.0)) for seed in (2, 0, 1)]


@pytest.mark.parametrize(("arm", "side", "limit", "result", "said"), [
    ("worse", "above", 0.0, "supports", "3 seeds support it"), ("worse", "below", 0.0, "refutes", "3 seeds refute it"),
    ("worse", "below", 1.0, "refutes", "below +1%"), ("level", "above", 0.0, "cannot tell", "3 seeds cannot tell")])
def test_a_claim_is_judged_from_its_rows(arm, side, limit, result, said):
    found = judge(Claim("Said", "somebody", arm, "ja", side, limit), toy_rows())
    assert found["verdict"] == result and said in found["sentence"] and found["source"] == "somebody"


def test_a_record_is_written_summed_up_and_plotted(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "project_root", lambda: tmp_path)
    assert claims.recorded("toy") == []
    path = claims.write_record("toy", "toy-tiny", "tiny", toy_rows(), measures=["ja"], seeds=[0, 1, 2], aside=["level"], unit="bits")
    (record,) = claims.recorded("toy")
    assert path == tmp_path / "nbs" / "studies" / "toy-tiny.json" and record["date"].startswith("20") and "cores" in record["hardware"]
    table = summary(record)
    assert [row["arm"] for row in table] == ["baseline", "worse", "level"] and table[1]["ja"] == "2.300" and table[0]["seconds"] == "8"
    assert table[1]["ja, from the first"].startswith("+9.5") and table[0]["ja, from the first"] == ""
    axes = plot(record).axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["worse"] and len(axes[0].collections[-1].get_offsets()) == 3


# ---- the list


def test_the_command_line_knows_every_study_and_each_claim_its_arm(monkeypatch):
    assert set(pipeline.STUDIES) == {"controls", *ABLATIONS}
    names = {}
    for study in ABLATIONS.values():
        for claim in study.claims:
            assert {claim.arm, claim.against} <= {arm.name for arm in study.arms} and claim.measure in study.measures
            assert claim.side in ("above", "below") and claim.arm != claim.against
        for arm in study.arms:
            assert names.setdefault(arm.name, asdict(arm)) == asdict(arm)  # one name, one training
    monkeypatch.setattr(ablations, "ablation", lambda *given: given)
    profile, root, name = pipeline.study("replay", "small", "somewhere")
    assert (profile, root.name, name) == ("small", "somewhere", "replay")
