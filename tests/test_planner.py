"""Extend or not: formulas against published figures, break-evens at their edges, bounds that hold, and the stage in the whole run."""
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shisa import planner
from shisa.config import ShisaError
from shisa.cost import BASES, MACHINES, PARTS, Machine, Shape, shape_of, training_flops
from shisa.planner import Case, added_memory, break_even, compare, fewest_tokens, model_pieces, token_count
from shisa.stage import Artifact, lineage, run_stage

MISTRAL, CONFIG, A100 = BASES["Mistral 7B"], planner.config("a100x16"), MACHINES["A100-40"]
TEXT = 16.6e9
gains = st.floats(0.5, 4)
positive = st.floats(1e-6, 1e12)


def case(after: float = 2.3, rows: int = 88_128, japanese: float = TEXT, learning: float = 1e9, before: float = 0.95) -> Case:
    return Case(MISTRAL, MISTRAL.with_rows(32_000 + rows), (before, after), japanese, 0.05, learning, 4096)


def plan(*arguments, price: float = 1.29, config=CONFIG, **changes):
    return compare(case(*arguments, **changes), A100, price, config)


@pytest.mark.parametrize(("base", "parameters"), [  # as the models' cards and safetensors indices give them
    ("Mistral 7B", 7_241_732_096), ("Mistral Nemo 12B", 12_247_782_400), ("llm-jp-3 13B", pytest.approx(13.7e9, rel=0.005))])
def test_shapes_have_the_published_parameters(base, parameters):
    assert BASES[base].parameters == parameters


@pytest.mark.parametrize(("parameters", "length", "tokens", "machine", "mfu"), [  # llm-foundry's table, 7B
    (6_658_859_008, 2048, 3_645, "A100-40", 0.504), (6_667_247_616, 4096, 8_611, "H100", 0.4042), (6_667_247_616, 4096, 3_684, "A100-80", 0.5484)])
def test_flops_give_the_published_share_of_the_peak(parameters, length, tokens, machine, mfu):
    assert abs(tokens * training_flops(parameters, 32, 4096, length) / MACHINES[machine].peak - mfu) < 0.001
    assert abs(MACHINES[machine].mfu - mfu) < 0.001


def test_flops_of_a_shape_are_those_of_the_real_model():
    from shisa.base import new_model
    from shisa.ablations import flops_per_token

    model = new_model(1_000, 64, 2, 4, 128, 0)
    shape = shape_of(model.config.to_dict())
    norms = (2 * shape.layers + 1) * shape.width
    assert shape.parameters == model.num_parameters()
    for candidates in (0, 300):
        attention = 12 * shape.layers * shape.heads * shape.head_width * 128
        assert shape.training_flops(128, candidates) - attention == flops_per_token(model, candidates) - 6 * norms


def test_config_without_a_field_names_it():
    with pytest.raises(ShisaError, match="intermediate_size"):
        shape_of({"num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100})


@given(st.integers(0, 10**6), st.integers(1, 64), st.integers(1, 10**5))
def test_memory_of_rows_is_in_proportion(rows, gpus, tokens):
    found = added_memory(MISTRAL, MISTRAL.with_rows(32_000 + rows), tokens, gpus)
    assert found["states"] == 16 * (MISTRAL.with_rows(32_000 + rows).parameters - MISTRAL.parameters)
    assert found["sharded"] * gpus == pytest.approx(found["states"]) and found["logits"] == 8 * rows * tokens


def test_break_even_at_its_edges():
    assert break_even(0, 0) == 0 and break_even(0, 5) == 0
    assert break_even(0, -1) == math.inf and break_even(1, 0) == math.inf and break_even(1, -1) == math.inf
    assert break_even(6, 3) == 2
    with pytest.raises(ShisaError, match="cost"):
        break_even(-1, 1)


@given(positive, positive, st.floats(1.01, 100))
def test_break_even_grows_with_cost_and_falls_with_saving(cost, saving, factor):
    assert break_even(cost * factor, saving) > break_even(cost, saving) > break_even(cost, saving * factor)
    assert break_even(cost, saving) * saving == pytest.approx(cost)


@given(gains, st.floats(1.01, 2))
def test_more_gain_never_hurts(after, factor):
    less, more = plan(after), plan(after * factor)
    for key in ("break_even_trained", "break_even_served"):
        assert less[key] is None or more[key] < less[key]
    assert more["saved_hours"] > less["saved_hours"] and more["serving_usd_after"] < less["serving_usd_after"]
    assert more["affordable_tokens"] >= less["affordable_tokens"]


@given(st.floats(0.5, 1), st.floats(0.5, 3), st.integers(64, 200_000))
def test_without_a_gain_it_never_pays(share, before, rows):
    found = plan(before * share, rows, before=before)
    assert found["break_even_trained"] is None and found["break_even_served"] is None
    assert found["saved_hours"] < 0 and found["affordable_tokens"] == 0


@given(st.floats(0, 50), st.floats(1.01, 10))
def test_price_moves_money_and_no_break_even(price, factor):
    cheap, dear = plan(price=price), plan(price=price * factor)
    for key in ("break_even_trained", "break_even_served", "saved_hours", "tokens_after"):
        assert cheap[key] == dear[key]
    for key in ("saved_usd", "serving_usd_before", "serving_usd_after", "learning_usd"):
        assert dear[key] == pytest.approx(cheap[key] * factor)


@given(st.floats(0, 1e11), st.floats(1e6, 1e11))
def test_a_larger_budget_saves_more_and_pays_at_the_same_place(japanese, more):
    small, large = plan(japanese=japanese), plan(japanese=japanese + more)
    assert large["saved_hours"] > small["saved_hours"] and large["break_even_trained"] == small["break_even_trained"]
    assert (large["saved_hours"] >= 0) == (japanese + more >= large["break_even_trained"]) or large["saved_hours"] == pytest.approx(0, abs=1e-6)


def test_units_agree():
    found = plan()
    assert found["tokens_after"] == pytest.approx(TEXT / 2.3 + 0.05 * TEXT)
    flops = found["tokens_after"] * MISTRAL.with_rows(120_128).training_flops(4096)
    assert found["hours_after"] * 3600 * A100.peak * A100.mfu == pytest.approx(flops)
    at = plan(japanese=found["break_even_trained"])
    assert at["saved_hours"] == pytest.approx(0, abs=1e-6) and at["affordable_tokens"] == pytest.approx(1e9)
    served = found["break_even_served"] / 1e6
    assert served * (found["serving_usd_before"] - found["serving_usd_after"]) == pytest.approx(found["learning_usd"])


def test_nothing_to_read_and_nothing_to_learn():
    idle = plan(japanese=0)
    assert idle["hours_before"] == idle["hours_after"] == idle["affordable_tokens"] == 0
    assert idle["saved_hours"] == -idle["learning_hours"] and idle["break_even_served"] > 0
    free = plan(learning=0)
    assert free["break_even_trained"] == free["break_even_served"] == free["learning_usd"] == 0
    same = compare(Case(MISTRAL, MISTRAL, (1, 1), TEXT, 0.05, 0, 4096), A100, 0, CONFIG)
    assert same["break_even_trained"] == same["saved_usd"] == same["saved_hours"] == 0


def test_serving_is_bound_by_bandwidth_at_small_batches_and_by_flops_at_large_ones():
    def hours(batch: int, **faster) -> float:
        machine = planner.replace(A100, memory=1e15, **faster)
        return planner.serving_hours(MISTRAL, 1.0, machine, CONFIG.change(serving_batch=batch, prompt_characters=1))

    assert hours(1, bandwidth=2 * A100.bandwidth) == pytest.approx(hours(1) / 2, rel=0.02)
    assert hours(1, peak=2 * A100.peak) == pytest.approx(hours(1), rel=0.02)
    assert hours(4096, peak=2 * A100.peak) < 0.6 * hours(4096)
    assert hours(16) < hours(1)


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(ShisaError, match="serving_batch"):
        plan(config=CONFIG.change(serving_batch=4_000))


@pytest.mark.parametrize("field", [{"price": -1}, {"machine": "abacus"}, {"learning_tokens": -1}, {"reply_characters": 0}, {"serving_batch": 0},
                                   {"published": (0.0, 2.3)}])
def test_bad_config_is_one_line_that_names_the_field(field):
    with pytest.raises(ShisaError, match=next(iter(field))):
        CONFIG.change(**field)


def slow_fewest(text: bytes, pieces: set[bytes]) -> int:
    """By trying every way to cut."""
    return 0 if not text else 1 + min(slow_fewest(text[n:], pieces) for n in range(1, len(text) + 1) if text[:n] in pieces)


@settings(deadline=None)
@given(st.text("ab", max_size=9), st.sets(st.text("ab", min_size=2, max_size=4), max_size=6))
def test_fewest_tokens_is_the_shortest_of_all_ways(text, words):
    pieces = {word.encode() for word in words} | {b"a", b"b", b" "}
    assert fewest_tokens([text], pieces) == slow_fewest(text.encode(), pieces)
    spaced = pieces | {b" " + text.encode()} if text else pieces
    assert fewest_tokens([text, text], spaced) <= 2 * fewest_tokens([text], pieces)


JAPANESE = ["窓を開けると、潮の香りがした。", "図書館は月曜日に休みます。\nA branch, too: 12:30–17:00.", "", "𠮷野家🍣 café"]


def test_no_tokenizer_is_below_the_bound_of_its_own_pieces():
    from shisa.base import mistral_model_file

    paths = {"Mistral": mistral_model_file(), **planner.other_paths(planner.config("tiny"))}
    pieces = {name: model_pieces(path) for name, path in paths.items()}
    used = {name: token_count(path, JAPANESE) for name, path in paths.items()}
    everything = set().union(*pieces.values())
    for name in paths:
        assert sum(map(len, JAPANESE)) > used[name] / 4 > 0
        assert used[name] >= fewest_tokens(JAPANESE, pieces[name]) >= fewest_tokens(JAPANESE, everything)
    assert len(pieces["Mistral Nemo 12B"]) > 130_000
    assert token_count(paths["Mistral Nemo 12B"], JAPANESE[:2]) < token_count(paths["Mistral"], JAPANESE[:2])


def test_a_json_that_is_no_tekken_file_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ShisaError, match="other.json.*tekken"):
        planner.at_most(tmp_path / "other.json", set(), JAPANESE, MISTRAL)


@given(st.lists(st.text("あいう", min_size=1, max_size=30), min_size=1, max_size=20), st.integers(1, 200), st.integers(0, 9))
def test_drawn_texts_are_whole_seeded_and_within_the_limit(texts, limit, seed):
    drawn = planner.drawn_texts(texts, limit, seed)
    assert drawn == planner.drawn_texts(texts, limit, seed) and all(drawn.count(text) <= texts.count(text) for text in drawn)
    assert len(drawn) == 1 or sum(map(len, drawn)) <= limit
    assert sorted(planner.drawn_texts(texts, 10**6, seed)) == sorted(texts)


def bits(base: float, untrained: float, counted: float, trained: float) -> dict:
    found = {"base": base, "untrained": untrained, "counted": counted, "trained": trained}
    return {"tokens": 5_000, "bits_per_byte": {name: {"ja": value} for name, value in found.items()}}


def test_caught_up_names_the_first_moment():
    assert planner.caught_up(bits(3, 2.9, 2, 1)) == ("untrained", 0)
    assert planner.caught_up(bits(3, 3.1, 2, 1)) == ("counted", 0)
    assert planner.caught_up(bits(3, 3.1, 3.2, 1)) == ("trained", 5_000)
    assert planner.caught_up(bits(3, 3.1, 3.2, 3.3)) == ("not in this run", None)


def study(adapted: float, full: float, part: float) -> list[dict]:
    return [{"model": "adapted (this run)", "ja": adapted, "tokens": 500},
            {"model": "no extension, equal text", "ja": full, "tokens": 1_000},
            {"model": "no extension, equal FLOPs", "ja": part, "tokens": 500}]


@given(st.floats(0.2, 5), st.floats(0.01, 2))
def test_text_for_equal_inverts_a_law_of_log_text(share, slope):
    """Without extension, bits = 3 − slope · ln(text); the extended model is as good as `share` less text would make that one."""
    law = {name: 3 - slope * math.log(text) for name, text in (("full", 1_000), ("part", 500), ("adapted", 1_000 / share))}
    assert planner.text_for_equal(study(law["adapted"], law["full"], law["part"])) == pytest.approx(share)


def test_text_for_equal_refuses_a_study_in_which_text_did_not_help():
    with pytest.raises(ShisaError, match="study controls"):
        planner.text_for_equal(study(2.0, 2.5, 2.4))


def test_predicted_seconds_come_from_flops_and_candidates():
    shape = Shape(width=64, layers=2, heads=4, kv_heads=2, head_width=16, hidden=160, rows=1_000)
    metrics = {"steps": 10, "training_seconds": 20}
    machine = Machine(1e9, 1e9, 1e9, 0.5, 1.0, "a toy")
    found = planner.predicted(shape, 128, machine, metrics, {"batch": 2, "candidates": 0, "processes": 1})
    assert found["flops"] == 10 * 2 * 128 * shape.training_flops(128)
    assert found["seconds_predicted"] == pytest.approx(found["flops"] / 5e8) and found["mfu"] == pytest.approx(found["flops"] / 20 / 1e9)
    fewer = planner.predicted(shape, 128, machine, metrics, {"batch": 2, "candidates": 100, "processes": 1})
    assert found["flops"] - fewer["flops"] == 10 * 2 * 128 * 6 * 900 * 64


@pytest.mark.shared
def test_llm_jp_is_measured_and_bounded_where_the_data_is(data_folder, monkeypatch):
    monkeypatch.setenv("SHISA_DATA", str(data_folder))
    path = planner.other_paths(planner.config("small")).get("llm-jp-3 13B")
    if path is None:
        pytest.skip("the data folder has no llm-jp tokenizer")
    (own, bound), shape = planner.at_most(path, {"潮の香り".encode()}, JAPANESE, BASES["llm-jp-3 13B"])
    assert bound >= own > 0.8
    assert shape.rows % 64 == 0 and 0 < shape.rows - BASES["llm-jp-3 13B"].rows <= 64


def test_stage_of_the_whole_run(finished_run):
    artifact = Artifact(finished_run / "32_planner")
    rows = {row["base"]: row for row in artifact.metrics["plan"]}
    assert artifact.table("plan.parquet").to_dicts() == artifact.metrics["plan"]
    own, ours = rows["this run's base"], rows["Mistral 7B, this run's pieces"]
    ratio = Artifact(finished_run / "22_tokenizer_report").metrics["ratios_ja"]["pooled"]
    assert own["gain"] == ours["gain"] == pytest.approx(ratio) and own["source"] == ours["source"] == "measured"
    assert own["learning_tokens"] == 0 and own["break_even_trained"] == 0 and own["saved_hours"] > 0
    assert rows["Mistral 7B, Shisa's pieces"]["rows_added"] == 88_128 and rows["Mistral 7B, Shisa's pieces"]["source"] == "published"
    nemo = rows["Mistral Nemo 12B, this run's pieces"]
    assert nemo["source"] == "at most" and nemo["characters_before"] > ours["characters_before"]
    assert nemo["characters_after"] >= max(nemo["characters_before"], ours["characters_after"])
    assert nemo["break_even_trained"] > ours["break_even_trained"]
    mix = Artifact(finished_run / "30_mix").metrics["tokens"]
    assert own["tokens_after"] == pytest.approx(mix["ja"] + mix["en"])
    stages = {(row["zero"], row["checkpointing"]): sum(row[part] for part in PARTS) for row in artifact.metrics["memory"]}
    assert len(stages) == 8 and stages[3, True] < stages[3, False] < stages[0, False]
    seconds = Artifact(finished_run / "31_pretrain").metrics["training_seconds"]
    assert artifact.metrics["predicted"]["seconds"] == seconds and 0 < artifact.metrics["predicted"]["mfu"] < 2


def test_same_inputs_give_the_same_bytes_and_another_price_does_not(finished_run, tmp_path):
    for ancestor in lineage("32_planner")[:-1]:
        os.symlink(finished_run / ancestor, tmp_path / ancestor)
    again = run_stage("32_planner", "tiny", tmp_path)
    reference = Artifact(finished_run / "32_planner")
    assert again.manifest["files"] == reference.manifest["files"] and again.manifest["fingerprint"] == reference.manifest["fingerprint"]
    with pytest.raises(ShisaError, match="config.price"):
        run_stage("32_planner", "tiny", tmp_path, config=planner.config("tiny").change(price=2.0))


def test_unknown_base_is_refused_and_an_absent_tokenizer_is_a_reject(finished_run, tmp_path):
    for ancestor in lineage("32_planner")[:-1]:
        os.symlink(finished_run / ancestor, tmp_path / ancestor)
    absent = run_stage("32_planner", "tiny", tmp_path, config=planner.config("tiny").change(others={"llm-jp-3 13B": "nowhere.model"}))
    assert absent.table("rejects.parquet").to_dicts()[0]["reason"] == "tokenizer not there"
    assert absent.counts == {"in": 4, "kept": 3, "dropped": {"tokenizer not there": 1}}
    changed = planner.config("tiny").change(others={"Gemma": "tekken_240911.json"})
    with pytest.raises(ShisaError, match="Gemma"):
        run_stage("32_planner", "tiny", tmp_path, config=changed, rebuild=True)


def test_report_shows_the_plan_and_no_committed_output_shows_a_time(finished_run):
    page = (finished_run / "report.md").read_text(encoding="utf-8")
    assert "Extend or not?" in page and "seconds, measured" in page and "Mistral Nemo 12B" in page
    notebook = Path(__file__).resolve().parents[1] / "nbs" / "32_planner.ipynb"
    outputs = json.dumps([cell.get("outputs") for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]])
    assert "seconds" not in outputs
