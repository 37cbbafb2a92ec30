"""Readers of published training sets: every schema, far and near, what is broken counted, nothing without a licence."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shisa.config import ShisaError
from shisa.sample import conversations, data_folder
from shisa.sets import best_path, far_files, known_sets, open_set, overall_score, read_ultrafeedback, schema_of, scored
from shisa.shapes import Unusable, conversation, language

AIROBOROS = [
    {"id": "a-1", "category": "trivia", "conversations": [{"from": "system", "value": "Answer briefly."}, {"from": "human", "value": "What colour is a ripe lemon?"}, {"from": "gpt", "value": "Yellow."}]},
    {"id": "a-2", "category": "joke", "conversations": [{"from": "human", "value": "Tell me one about a snail."}]},
    {"id": "a-3", "category": "chat", "conversations": [{"from": "human", "value": "Hello there."}, {"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Bye."}]},
]
SLIMORCA = [
    {"conversations": [{"from": "system", "value": "Think step by step.", "weight": None}, {"from": "human", "value": "Is 9 odd?", "weight": 0.0}, {"from": "gpt", "value": "9 is odd.", "weight": 1.0}]},
    {"conversations": [{"from": "human", "value": "Is 8 odd?", "weight": 0.0}, {"from": "gpt", "value": "  ", "weight": 1.0}]},
]


def completion(model: str, response: str, score: object, fine: object = None) -> dict:
    """An answer in UltraFeedback's schema."""
    ratings = {name: {"Rating": "4", "Rationale": "fine"} for name in ("helpfulness", "honesty", "instruction_following", "truthfulness")}
    return {"model": model, "principle": "helpfulness", "custom_system_prompt": "Be helpful.", "annotations": ratings, "response": response,
            "overall_score": score, "fine-grained_score": fine, "critique": "It is short."}


def feedback(source: str, *completions: dict) -> dict:
    """A row in UltraFeedback's schema."""
    return {"source": source, "instruction": "Name a fruit.", "models": [each["model"] for each in completions], "completions": list(completions),
            "correct_answers": ["None"], "incorrect_answers": ["None"]}


ULTRAFEEDBACK = [
    feedback("evol_instruct", completion("m1", "Apple, for one.", 9.0, 4.5), completion("m2", "A stone.", 10, 1.5), completion("m3", "Pear.", 9.0, 4.75)),
    feedback("sharegpt", completion("m1", "Plum.", "N/A"), completion("m2", "Fig.", None)),
    feedback("truthful_qa", completion("m1", "Quince.", 8)),
    feedback("flan_v2_p3", completion("m1", "Melon.", 10, 3.0), completion("m2", "Lime.", 6), completion("m3", "", 9)),
]
BINARIZED = [{"prompt": "Name a tree.", "prompt_id": "p-1", "chosen": [{"role": "user", "content": "Name a tree."}, {"role": "assistant", "content": "Oak."}],
              "rejected": [{"role": "user", "content": "Name a tree."}, {"role": "assistant", "content": "Rose."}],
              "messages": [{"role": "user", "content": "Name a tree."}, {"role": "assistant", "content": "Oak."}], "score_chosen": 9.5, "score_rejected": 4.0}]
DOLLY = [{"instruction": "Who keeps the bees?", "context": "Ana keeps bees behind the mill.", "response": "Ana does.", "category": "closed_qa"},
         {"instruction": "Name two knots.", "context": "", "response": "Bowline and reef knot.", "category": "open_qa"}]
DOLLY_JA = [{"index": "0", "category": "closed_qa", "instruction": "蜂を飼っているのは誰ですか。", "input": "水車の裏でアナが蜂を飼っています。", "output": "アナです。"}]


def message(id: str, parent: str | None, text: str, rank: int | None = None, lang: str = "en", tree: str = "t-1", **more: object) -> dict:
    """A message in OASST's schema."""
    depth = 0 if parent is None else len(parent.split("."))
    return {"message_id": id, "parent_id": parent, "text": text, "role": "assistant" if depth % 2 else "prompter", "lang": lang, "rank": rank,
            "deleted": False, "review_result": True, "synthetic": False, "message_tree_id": tree, "tree_state": "ready_for_export", **more}


OASST = [
    message("t-1", None, "How do I tie a scarf?"), message("t-1.a", "t-1", "Loop it once.", 1), message("t-1.b", "t-1", "Fold it, then loop it.", 0),
    message("t-1.c", "t-1", "spam", 0, deleted=True), message("t-1.d", "t-1", "Refused.", 0, review_result=False),
    message("t-1.b.x", "t-1.b", "And a tie?"), message("t-1.b.x.y", "t-1.b.x", "That is longer to tell."), message("t-1.a.z", "t-1.a", "Beside the path."),
    message("t-2", None, "¿Cómo estás?", lang="es", tree="t-2"), message("t-2.a", "t-2", "Bien.", lang="es", tree="t-2"),
    message("t-3", None, "結び方を教えてください。", lang="ja", tree="t-3"), message("t-3.a", "t-3", "輪を作って通します。", lang="ja", tree="t-3"),
    message("t-4", None, "Gone.", tree="t-4", deleted=True),
]


def tree(rows: list[dict], root: dict) -> dict:
    """A tree as in the .trees files, from rows of messages."""
    def node(row: dict) -> dict:
        return {**{key: row[key] for key in ("message_id", "text", "role", "lang", "rank", "deleted", "review_result")}, "replies": [node(each) for each in rows if each["parent_id"] == row["message_id"]]}

    return {"message_tree_id": root["message_tree_id"], "tree_state": root["tree_state"], "prompt": node(root)}


TREES = [tree(OASST, root) for root in OASST if root["parent_id"] is None]
EXPECTED = {  # rows: kept, dropped by reason
    "airoboros": (AIROBOROS, 2, {"no answer": 1}), "slimorca": (SLIMORCA, 1, {"empty turn": 1}),
    "ultrafeedback": (ULTRAFEEDBACK, 2, {"no scored completion": 1, "of a benchmark: TruthfulQA": 1}), "binarized": (BINARIZED, 1, {}),
    "dolly": (DOLLY, 2, {}), "dolly_ja": (DOLLY_JA, 1, {}), "trees": (TREES, 2, {"language not asked for": 1, "prompt deleted or refused in review": 1}),
    "messages": (OASST, 2, {"language not asked for": 1, "prompt deleted or refused in review": 1}),
}
SCHEMA = {"trees": "oasst", "messages": "oasst", "dolly_ja": "dolly"}


def written(path: Path, rows: list[dict]) -> Path:
    """The rows in the form that the path's end asks for."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pl.DataFrame(rows, infer_schema_length=None, strict=False).write_parquet(path)
    else:
        path.write_bytes(json.dumps(rows).encode() if path.suffix == ".json" else gzip.compress(lines) if path.suffix == ".gz"
                         else zstandard.compress(lines) if path.suffix == ".zst" else lines)
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet"])
@pytest.mark.parametrize("name", EXPECTED)
def test_every_schema_in_every_form(name, ending, tmp_path):
    rows, kept, dropped = EXPECTED[name]
    if ending == ".parquet" and name == "trees":
        pytest.skip("the trees are published as JSON lines alone")
    path, told = written(tmp_path / f"{name}{ending}", rows), []
    for schema in (SCHEMA.get(name, name), "auto"):
        if schema == "auto" and name in ("airoboros", "slimorca"):
            continue  # nothing but `conversations` tells them from others: "shaped" reads them the same
        found = open_set(str(path), schema, licence="MIT", drop=lambda *one: told.append(one))
        assert len(list(found)) == found.kept == kept and found.dropped == dropped and found.read == kept + sum(dropped.values())
    assert all(reason in dropped and id and where.startswith(str(path)) for id, reason, _, where in told)


def test_what_the_rows_say(tmp_path):
    def rows(name):
        return list(open_set(str(written(tmp_path / f"{name}.jsonl", EXPECTED[name][0])), SCHEMA.get(name, name), licence="MIT"))

    first, second = rows("airoboros")
    assert first == {"id": "airoboros/a-1", "source": "airoboros", "licence": "MIT", "lang": "en", "kind": "trivia", "messages": [
        {"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "What colour is a ripe lemon?"}, {"role": "assistant", "content": "Yellow."}]}
    assert [m["role"] for m in second["messages"]] == ["user", "assistant"]  # the question that nobody answered is left off
    assert rows("slimorca")[0]["id"] == rows("slimorca")[0]["id"] and rows("slimorca")[0]["messages"][0]["role"] == "system"
    best = rows("ultrafeedback")[0]
    assert best["score"] == 9 and best["messages"][-1]["content"] == "Pear." and [each["model"] for each in best["completions"]] == ["m3", "m1", "m2"]
    assert best["completions"][-1]["score"] == 1.0 and best["kind"] == "evol_instruct"
    assert rows("binarized")[0]["completions"] == [{"model": "chosen", "response": "Oak.", "score": 9.5}, {"model": "rejected", "response": "Rose.", "score": 4.0}]
    assert rows("dolly")[0]["messages"][0]["content"] == "Who keeps the bees?\n\nAna keeps bees behind the mill." and rows("dolly_ja")[0]["lang"] == "ja"
    talk, japanese = rows("messages")
    assert [m["content"] for m in talk["messages"]] == ["How do I tie a scarf?", "Fold it, then loop it.", "And a tie?", "That is longer to tell."]
    assert (talk["id"], japanese["lang"]) == ("messages/t-1", "ja")
    assert [row["messages"] for row in rows("trees")] == [talk["messages"], japanese["messages"]]


def test_scores_of_ten_that_are_ones_are_mended_and_counted(tmp_path):
    assert overall_score(completion("m", "x", 10, 4.25)) == (10.0, "") and overall_score(completion("m", "x", 10, 2.0)) == (1.0, "10 that is a 1")
    assert overall_score(completion("m", "x", 10, 3.5)) == (None, "10 in doubt") and overall_score({"overall_score": 10}) == (None, "10 in doubt")
    assert overall_score(completion("m", "x", "10")) == (None, "10 in doubt")  # four annotations of 4: a mean of 4
    assert overall_score({"overall_score": "N/A"}) == (None, "score missing") and overall_score({"overall_score": float("nan")}) == (None, "score missing")
    found = read_ultrafeedback(str(written(tmp_path / "uf.jsonl", ULTRAFEEDBACK)), licence="MIT")
    assert [row["score"] for row in found] == [9.0, 6.0]
    assert found.notes == {"10 that is a 1": 1, "10 in doubt": 1, "score missing": 2, "empty completion": 1}


@given(st.lists(st.tuples(st.integers(0, 10), st.sampled_from([None, 1.0, 3.0, 5.0]), st.text("ab", min_size=1, max_size=3)), max_size=6), st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_best_answer_does_not_depend_on_the_order_of_the_answers(answers, draw):
    rows = [completion("m", text, score, fine) for score, fine, text in answers]
    shuffled = draw.sample(rows, len(rows))
    assert scored(rows, Counter()) == scored(shuffled, Counter()) and len(scored(rows, Counter())) == len(rows)


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from([None, 0, 1, 2]), st.booleans(), st.sampled_from([True, False, None])), max_size=30), st.randoms())
@settings(max_examples=60, deadline=None)
def test_a_tree_loses_no_message_and_its_path_does_not_depend_on_the_order_of_rows(replies, draw):
    rows = [{"message_id": "0", "parent_id": None, "text": "root", "role": "prompter"}]
    rows += [{"message_id": str(n), "parent_id": str(parent % n), "text": f"reply {n}", "rank": rank, "deleted": deleted, "review_result": review}
             for n, (parent, rank, deleted, review) in enumerate(replies, 1)]
    told, again = Counter(), Counter()
    path = best_path(rows, told)
    assert path == best_path(draw.sample(rows, len(rows)), again) and told == again
    assert len(path) + told.total() == len(rows) and not any(m.get("deleted") or m.get("review_result") is False for m in path[1:])
    for above, below in zip(path, path[1:], strict=False):
        assert below["parent_id"] == above["message_id"]


ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "text", "prompt", "replies", "message_id", "completions", "response"]), inner, max_size=3), max_leaves=8)


@given(st.lists(st.dictionaries(st.sampled_from(["messages", "conversations", "prompt", "response", "instruction", "output", "chosen", "rejected", "id", "lang"]), ANY, max_size=4), max_size=8))
@settings(max_examples=60, deadline=None)
def test_odd_records_are_counted_and_never_raise(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("odd") / "odd.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in records) + b"[1, 2]\n\xff\xfe\n\n")
    found = open_set(str(path), "shaped", licence="MIT")
    rows = list(found)
    assert found.read == len(records) + 2 == len(rows) + found.dropped.total() and len({row["id"] for row in rows}) == len(rows)
    assert all(m["content"].strip() and m["content"].encode() for row in rows for m in row["messages"])


def test_a_torn_file_and_broken_lines_are_counted(tmp_path):
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in DOLLY * 3000).encode())
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found = open_set(str(tmp_path), "dolly", licence="MIT")
    assert len(list(found)) > 0 and found.dropped["torn file"] == 1
    (tmp_path / "torn.jsonl.gz").unlink()
    (tmp_path / "half.json").write_bytes(json.dumps(DOLLY)[:-30].encode())
    broken = open_set(str(tmp_path / "half.json"), "dolly", licence="MIT")
    assert list(broken) == [] and broken.dropped == {"not a JSON object": 1} and broken.read == 1
    (tmp_path / "half.json").unlink()
    written(tmp_path / "whole.json", DOLLY)
    assert [entry["name"] for entry in open_set(str(tmp_path), "dolly", licence="MIT").entries] == ["whole.json"]
    (tmp_path / "lone.jsonl").write_text('{"prompt": "half \\ud83d a character", "response": "Yes \\ud83d, half."}\n', encoding="utf-8")
    row = next(open_set(str(tmp_path / "lone.jsonl"), licence="MIT"))
    assert row["messages"][1]["content"] == "Yes ?, half."


def test_the_same_id_twice_loses_nothing(tmp_path):
    path = written(tmp_path / "twice.jsonl", [{"id": 1, "prompt": "One?", "response": "Yes."}, {"id": 1, "prompt": "Two?", "response": "No."}])
    assert [row["id"] for row in open_set(str(path), licence="MIT")] == ["twice/1", "twice/1-2"]


def test_the_licence_is_the_rows_own_or_given_or_known_or_beside_or_refused(tmp_path):
    path = written(tmp_path / "set" / "talks.jsonl" if (tmp_path / "set").mkdir() is None else tmp_path, [{"prompt": "One?", "response": "Yes."}])
    with pytest.raises(ShisaError, match="talks.jsonl: its licence is unknown; .* field `licence`") as caught:
        list(open_set(str(path)))
    assert "\n" not in str(caught.value)
    (tmp_path / "set" / "SOURCE.txt").write_text("licence: CC BY 4.0\n")
    assert next(open_set(str(path)))["licence"] == "CC BY 4.0" and next(open_set(str(path), licence="MIT"))["licence"] == "MIT"
    written(path, [{"prompt": "One?", "response": "Yes.", "license": "CC0"}, {"prompt": "One?", "response": "Yes.", "license": "unknown"}])
    assert [row["licence"] for row in open_set(str(path))] == ["CC0", "CC BY 4.0"]
    assert all(about["licence"] and about["source"].startswith("https://") for about in known_sets().values())


def test_far_sets_are_read_file_by_file(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for name, rows in (("b.jsonl", DOLLY[1:]), ("a.jsonl", DOLLY[:1]), ("skip.txt", [])):
        system.pipe(f"/far/{name}", "".join(json.dumps(row) + "\n" for row in rows).encode())
    assert [entry["name"] for entry in far_files("memory://far", ["*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    near = [row["messages"] for row in open_set(str(written(tmp_path / "d.jsonl", DOLLY)), "dolly", licence="MIT")]
    assert [row["messages"] for row in open_set("memory://far", "dolly", licence="CC BY-SA 3.0")] == near
    with pytest.raises(ShisaError, match="no data file there"):
        open_set("memory://nowhere", licence="MIT")
    with pytest.raises(ShisaError, match="no such file or folder, and no id of the Hub"):
        open_set("no-such-set", licence="MIT")


def test_unknown_columns_are_named():
    with pytest.raises(ShisaError, match="left, right"):
        schema_of(["left", "right"], "odd.jsonl")
    assert schema_of(["message_id", "parent_id", "text", "role", "lang"], "") == "oasst" and schema_of(["completions", "instruction"], "") == "ultrafeedback"


def test_the_bundled_sample_comes_through_the_same_door():
    found = open_set("sample")
    rows = list(found)
    assert [row["id"] for row in rows] == [chat["id"] for chat in conversations()] and found.dropped == {}
    assert [row["messages"] for row in rows] == [chat["messages_en"] for chat in conversations()] and {row["lang"] for row in rows} == {"en"}
    with pytest.raises(Unusable, match="same role twice"):
        conversation([("user", "a"), ("assistant", "b"), ("assistant", "c")])
    assert language("그것은 빨간색입니다") == "other"


@pytest.mark.shared
def test_real_sets_are_read_without_loss():
    folder = data_folder()
    dolly = open_set(str(folder / "parallel" / "dolly_ja"), "dolly")
    rows = list(dolly)
    lines = zstandard.open(folder / "parallel" / "dolly_ja" / "dolly_ja.jsonl.zst", "rb").read().count(b"\n")
    assert dolly.read == lines == len(rows) + dolly.dropped.total() and dolly.licence == "CC BY-SA 3.0"
    assert len(rows) > 0.99 * lines and sum(row["lang"] == "ja" for row in rows) > 0.95 * len(rows)
    pairs = open_set(str(folder / "pref" / "hh_rlhf" / "harmless-base"))
    rows = list(pairs)
    assert pairs.schema == "shaped" and pairs.licence == "MIT" and pairs.read == len(rows) + pairs.dropped.total() and len(rows) > 2000
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
    assert random.Random(0).choice(rows)["id"].startswith("harmless_base/")
