"""The review of a training set: every planted fault is found, its near miss is not; any frame gets a review."""

import gzip
import json
import os
import time
import tomllib
from pathlib import Path

import polars as pl
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shisa import review as chapter
from shisa.config import ShisaError, file_sha256
from shisa.evalsets import evaluation_texts
from shisa.leaks import english_clause, styles, third_language, unpaired
from shisa.review import CHECKS, FINDINGS, MARKS_FILE, review
from shisa.sample import conversations, documents, preferences
from shisa.shapes import KNOWN_ROLES, read_set, shape_of, turns_of

ASKED = "日本の首都はどこですか。"
ANSWER = "日本の首都は東京です。"


def talk(*turns: str | tuple[str, str], id: str = "row") -> dict:
    """A conversation; bare strings take turns as user and assistant."""
    roles = [turn if isinstance(turn, tuple) else (("user", "assistant")[place % 2], turn) for place, turn in enumerate(turns)]
    return {"id": id, "licence": "Apache-2.0", "messages": [{"role": role, "content": content} for role, content in roles]}


def found_in(*rows: dict, against: tuple = ()) -> set[str]:
    """The findings of these rows."""
    frame = pl.DataFrame(list(rows), infer_schema_length=None)
    return set(review(frame, against=list(against)).marks["finding"])


PASSAGE = ("朝の市場には、魚や野菜や花を売る店が並びます。近所の人が袋を持って集まり、店の人と話をします。雨の日には屋根の下に席ができて、"
           "温かいお茶が配られます。昼を過ぎると店は片付けられ、広場は子どもたちの遊び場になります。夕方にはまた静かになり、猫だけが残ります。")
LONG = "朝の市場には、魚や野菜や花を売る店が並び、近所の人が袋を持って集まります。"
PLANTED: list[tuple[str, list[dict], list[dict]]] = [
    ("licence unknown", [talk(ASKED, ANSWER) | {"licence": "unknown"}], [talk(ASKED, ANSWER) | {"licence": "MIT"}]),
    ("licence share-alike", [talk(ASKED, ANSWER) | {"licence": "cc-by-sa-4.0"}], [talk(ASKED, ANSWER) | {"licence": "cc-by-4.0"}]),
    ("empty turn", [talk(ASKED, " \n")], [talk(ASKED, "。")]),
    ("unknown role", [talk(ASKED, ("teacher", ANSWER))], [talk(("system", "簡潔に。"), ("user", ASKED), ("assistant", ANSWER))]),
    ("same role twice", [talk(("user", ASKED), ("user", "早く。"), ("assistant", ANSWER))], [talk(ASKED, ANSWER, "ありがとう。", "はい。")]),
    ("system turn not first", [talk(("user", ASKED), ("system", "簡潔に。"), ("assistant", ANSWER))], [talk(("system", "簡潔に。"), ("user", ASKED), ("assistant", ANSWER))]),
    ("no question", [talk(("assistant", ANSWER))], [talk(("system", "簡潔に。"), ("user", ASKED), ("assistant", ANSWER))]),
    ("no answer", [talk(ASKED)], [talk(ASKED, ANSWER)]),
    ("answer repeats the question", [talk(ASKED, ASKED + "\n")], [talk(ASKED, ASKED + ANSWER)]),
    ("answer cut off", [talk(ASKED, "日本の首都は東京です。東京には、多くの人が住んでおり、")], [talk(ASKED, "日本の首都は東京です。多くの人が住んでいます")]),
    ("answer repeats itself", [talk(ASKED, LONG + "はい。" + LONG + "はい。" + LONG)], [talk(ASKED, LONG + "はい。" + LONG + "はい、はい、はい。")]),
    ("answer in another language", [talk(ASKED, "The capital of Japan is the city of Tokyo, as you know.")],
     [talk("「日本の首都」を英語で説明してください。", "The capital of Japan is the city of Tokyo, as you know.")]),
    ("English left", [talk(ASKED, "首都は東京です。It is the largest city that we have in the country.")], [talk(ASKED, "首都は東京です。『The Lord of the Rings』や「this is how it is done」もあります。")]),
    ("third language left", [talk(ASKED, "首都は東京です。这个问题我们已经说过了请您再看一遍。")], [talk("「東京」を中国語で言うと？", "这个问题我们已经说过了请您再看一遍、と書きます。")]),
    ("same row", [talk(ASKED, ANSWER), talk(ASKED, ANSWER + " ", id="b")], [talk(ASKED, ANSWER), talk(ASKED, "東京です。", id="b")]),
    ("same question", [talk(ASKED, ANSWER), talk(ASKED, "東京です。", id="b")], [talk(ASKED, ANSWER), talk("首都は？", "東京です。", id="b")]),
    ("near duplicate", [talk("市場はどんな所ですか。", LONG + LONG[:20]), talk("市場はどんな所ですか。", LONG + LONG[:21], id="b")],
     [talk("市場はどんな所ですか。", LONG), talk("市場はどんな所ですか。", "夜の港には、船を待つ人が静かに並んでいます。", id="b")]),
    ("same passage", [talk("次の文を読んで、何を売るか答えてください。\n" + PASSAGE, "魚や野菜や花です。"), talk("次の文を読んで、誰が来るか答えてください。\n" + PASSAGE, "近所の人たちです。", id="b")],
     [talk("次の文を読んで、何を売るか答えてください。\n" + LONG, "魚や野菜や花です。"), talk("夜の港の様子は？", "静かです。", id="b")]),
    ("bracket without partner", [talk(ASKED, "雪国』は小説です。")], [talk(ASKED, "1）『雪国』は小説です（有名です）。2）「伊豆の踊子」もです :)")]),
    ("polite and plain mixed", [talk(ASKED, "東京は首都である。人口も多いです。")], [talk(ASKED, "「東京は首都である。」と書かれています。\n- 人が多くいる。\n人口も多いです。")]),
    ("plain throughout", [talk(ASKED, "東京は首都である。人口も多い。")], [talk(ASKED, "東京は首都です。人口も多いです。")]),
    ("straight quotes", [talk(ASKED, "それは \"首都 \"と呼ばれます。")], [talk(ASKED, "コードは `print(\"首都\")` です。")]),
    ("full stop lost", [talk(ASKED, "東京は首都です[3] 人口も多いです。")], [talk(ASKED, "東京は首都です。[3] 人口も多いです。")]),
    ("half-width punctuation", [talk(ASKED, "東京,大阪があります.")], [talk(ASKED, "東京、大阪があります。1,000円、v1.2です。")]),
    ("curly quotes", [talk(ASKED, "それは“首都”です。")], [talk(ASKED, "それは「首都」です。")]),
    ("letters set apart", [talk(ASKED, "リ セ ッ ト します。")], [talk(ASKED, "名前 住所 電話 備考")]),
    ("doubled punctuation", [talk(ASKED, "東京、。大阪です。")], [talk(ASKED, "東京……。大阪です。")]),
    ("you, twice", [talk(ASKED, "あなたはあなたの部屋を見ます。")], [talk(ASKED, "「あなたはあなたです」と言いました。")]),
    ("translator's note", [talk(ASKED, "以下は翻訳です。\n首都は東京です。")], [talk("次の文を翻訳してください。The capital is Tokyo.", "以下は翻訳です。\n首都は東京です。")]),
    ("address broken", [talk(ASKED, "https：//example.com を見てください。")], [talk(ASKED, "https://example.com を見てください。")]),
    ("placeholder broken", [talk(ASKED, "｛name｝様、こんにちは。")], [talk(ASKED, "{name}様、こんにちは。")]),
    ("code translated", [talk(ASKED, "```python\ndef add(a, b)：\n    return a + b\n```")], [talk(ASKED, "```python\ndef add(a, b):\n    return \"（合計）\"  # 足す：返す\n```")]),
    ("Python does not parse", [talk(ASKED, "```python\nprint('a'\n```")], [talk(ASKED, "```python\n>>> print('a')\na\n```\n```python\n%time x = 1\n```")]),
    ("fence not closed", [talk(ASKED, "```\nls -l")], [talk(ASKED, "```\nls -l\n```")]),
    ("citation mark", [talk(ASKED, "首都です[12]。")], [talk(ASKED, "`a[12]` と書きます。")]),
    ("markup left", [talk(ASKED, "首都です。<br>東京&nbsp;です。")], [talk(ASKED, "`<br>` は改行です。a < b です。")]),
    ("characters destroyed", [talk(ASKED, "首都\ufffd東京です。")], [talk(ASKED, "首都□東京です。")]),
    ("e-mail address", [talk(ASKED, "taro@mail-server.net に送ります。")], [talk(ASKED, "taro@example.com に送ります。")]),
    ("telephone number", [talk(ASKED, "電話は03-1234-5678です。")], [talk(ASKED, "製品は2024-01-15の103-22です。")]),
    ("chosen equals rejected", [{"prompt": ASKED, "chosen": ANSWER, "rejected": ANSWER}], [{"prompt": ASKED, "chosen": ANSWER, "rejected": "知りません。"}]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bad", "good"), PLANTED, ids=[name for name, _, _ in PLANTED])
def test_a_planted_fault_is_found_and_its_near_miss_is_not(name, bad, good):
    assert name in found_in(*bad)
    assert name not in found_in(*good)


def test_every_finding_is_planted_and_well_formed():
    elsewhere = {"broken line", "benchmark item"}  # in the two tests below
    assert {name for name, _, _ in PLANTED} | elsewhere == set(FINDINGS)
    for name, finding in tomllib.loads(MARKS_FILE.read_text(encoding="utf-8")).items():
        assert {"group", "severity", "where", "definition"} <= set(finding), name
        assert finding["severity"] in ("error", "warning", "note") and len(finding["definition"]) <= 120, name
        assert finding.get("check", next(iter(CHECKS))) in CHECKS and ("column" in finding) == ("pattern" in finding), name
        assert finding.get("precision", 1) >= 0.8 and ("precision" in finding) == ("read" in finding), name


def test_benchmark_items_are_found_and_named():
    against = evaluation_texts(None)
    item = next(row for row in against if len(row["text"]) > 60)
    half = item["text"][: len(item["text"]) // 3]
    found = review(pl.DataFrame([talk(f"次に答えてください。{item['text']}", ANSWER, id="a"), talk(f"次に答えてください。{half}", ANSWER, id="b")]), against=against)
    marks = found.marks.filter(pl.col("finding") == "benchmark item")
    assert marks["id"].to_list() == ["a"] and item["id"].split("/")[0] in marks["evidence"][0]


# what it reads


def write_rows(path: Path, rows: list) -> Path:
    """Rows as JSON lines, compressed as the name says."""
    content = "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows).encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, lambda data: data)
    path.write_bytes(pack(content))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_files_folders_and_broken_lines(tmp_path, name):
    path = write_rows(tmp_path / name, [talk(ASKED, ANSWER, id="good"), "{torn", "[1]", "", talk("首都は？", "東京です。", id="also good")])
    for source in (path, tmp_path, str(path)):
        found = review(source, against=[])
        assert found.facts["rows"] == 4
        assert found.marks.filter(pl.col("finding") == "broken line")["id"].to_list() == [f"{name}:2", f"{name}:3"]


def test_parquet_and_frames_agree(tmp_path):
    frame = pl.DataFrame([talk(ASKED, "首都です[12]。", id="a"), talk("首都は？", "東京,大阪です。", id="b")])
    frame.write_parquet(tmp_path / "a.parquet")
    assert review(frame, against=[]).marks.equals(review(tmp_path / "a.parquet", against=[]).marks)


SHAPES = [
    ({"text": LONG}, "documents", [("document", LONG)]),
    ({"messages": [{"role": "user", "content": "a"}]}, "messages", [("user", "a")]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}, "messages", [("user", "a\n")]),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "conversations", [("user", "a"), ("assistant", "b")]),
    ({"instruction": "a", "input": "b", "output": "c"}, "instructions", [("user", "a\n\nb"), ("assistant", "c")]),
    ({"instruction": "a", "input": "", "output": "c", "system": "s"}, "instructions", [("system", "s"), ("user", "a"), ("assistant", "c")]),
    ({"question": "a", "answer": "b"}, "question and answer", [("user", "a"), ("assistant", "b")]),
    ({"prompt": "a", "completion": 7}, "question and answer", [("user", "a"), ("assistant", "7")]),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs", [("user", "a"), ("assistant", "b"), ("rejected", "c")]),
    ({"messages": "[{\"role\": \"user\", \"content\": \"a\"}]"}, "messages", [("user", "a")]),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "pairs", [("user", "a"), ("assistant", "b"), ("rejected", "c")]),
    ({"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "b"}]},
     "pairs", [("user", "a"), ("assistant", "b"), ("rejected", "b")]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "shape", "turns"), SHAPES)
def test_shapes(row, shape, turns):
    assert shape_of(list(row), "here") == shape
    assert turns_of(row, shape) == turns
    assert all(role in KNOWN_ROLES for role, _ in turns)


def test_unknown_shapes_and_missing_sources_are_one_line(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"left": 1, "right": 2}])
    (tmp_path / "empty").mkdir()
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    for source, said in ((tmp_path / "a.jsonl", "left, right"), (tmp_path / "empty", "no training set"), (tmp_path / "nowhere", "no training set"),
                         (tmp_path / "b.parquet", "b.parquet"), (pl.DataFrame({"x": [1]}), "columns x")):
        with pytest.raises(ShisaError, match=said) as error:
            review(source, against=[])
        assert "\n" not in str(error.value)


def test_the_licence_beside_a_file_counts(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"instruction": ASKED, "input": "", "output": ANSWER}])
    assert "licence unknown" in set(review(tmp_path, against=[]).marks["finding"])
    (tmp_path / "SOURCE.txt").write_text("repo somewhere\nlicence CC BY-SA 3.0\n")
    assert review(tmp_path, against=[]).facts["licences"] == {"CC BY-SA 3.0": 1}
    (tmp_path / "SOURCE.txt").unlink()
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert review(tmp_path, against=[]).facts["licences"] == {"apache-2.0": 1}


def test_folders_below_and_artifacts(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        write_rows(tmp_path / "set" / name / "train.jsonl", [{"question": f"{name}とは何ですか。", "answer": ANSWER}])
    (tmp_path / "set" / "SOURCE.txt").write_text("licence: MIT\n")
    (tmp_path / "set" / "manifest.json").write_text('{"not": "ours"}')
    rows, _ = read_set(tmp_path / "set")
    assert rows["id"].to_list() == ["a/train.jsonl:1", "b/train.jsonl:1"] and set(rows["licence"]) == {"MIT"}
    frame = pl.DataFrame({"prompt": [ASKED], "chosen": [ANSWER], "rejected": ["知りません。"]})
    (tmp_path / "60_pairs").mkdir()
    frame.write_parquet(tmp_path / "60_pairs" / "pairs.parquet")
    frame.write_parquet(tmp_path / "60_pairs" / "rejects.parquet")
    files = {name: {"sha256": file_sha256(tmp_path / "60_pairs" / name)} for name in ("pairs.parquet", "rejects.parquet")}
    manifest = {"stage": "60_pairs", "files": files, "fingerprint": "0", "metrics": {}, "counts": {}, "licences": [{"licence": "Apache-2.0"}]}
    (tmp_path / "60_pairs" / "manifest.json").write_text(json.dumps(manifest))
    rows, turns = read_set(tmp_path / "60_pairs")
    assert rows["licence"].to_list() == ["Apache-2.0"] and turns["role"].to_list() == ["user", "assistant", "rejected"]


def test_repeated_ids_are_replaced_by_places():
    rows, _ = read_set(pl.DataFrame([talk(ASKED, ANSWER), talk("首都は？", ANSWER)]))
    assert rows["id"].to_list() == ["0", "1"]


# what it says


def test_the_bundled_sample_is_nearly_clean(tmp_path):
    chats = [{"id": row["id"], "licence": "Apache-2.0", "messages": row["messages_ja"]} for row in conversations()]
    pairs = [{key: row[key] for key in ("id", "prompt", "chosen", "rejected")} | {"licence": "Apache-2.0"} for row in preferences()]
    texts = [{"id": row["id"], "licence": "Apache-2.0", "text": row["ja"]} for row in documents()]
    for rows in (chats, pairs, texts):
        found = review(pl.DataFrame(rows), against=[])
        notes = [name for name, finding in FINDINGS.items() if finding["severity"] == "note"]
        marked = found.marks.filter(~pl.col("finding").is_in(notes))
        assert marked["id"].n_unique() <= 0.02 * len(rows), marked.rows()
        found.write(tmp_path)
        assert pl.read_parquet(tmp_path / "review.parquet").columns == ["id", "finding", "evidence"]
        page = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert page.startswith("# Review") and len(page.splitlines()) <= 80


def test_personal_marks_are_counted_and_not_shown():
    found = review(pl.DataFrame([talk(ASKED, "taro@mail-server.net か 03-1234-5678 へどうぞ。")]), against=[])
    personal = found.marks.filter(pl.col("finding").is_in(["e-mail address", "telephone number"]))
    assert personal["evidence"].to_list() == ["", ""]
    assert "mail-server" not in found.report()


def test_tokens_of_two_tokenizers():
    from shisa.base import mistral_model_file
    from shisa.tokenizer_report import open_tokenizer

    opened = open_tokenizer(mistral_model_file())
    found = review(pl.DataFrame([talk(ASKED, ANSWER)]), opened, mistral_model_file(), against=[])
    assert found.facts["tokens"] == found.facts["tokens, base"] == len(opened([f"{ASKED}\n{ANSWER}"])[0])


messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "", "teacher"]) | st.none(),
                           "content": st.text(st.characters(codec="utf-8"), max_size=60) | st.none() | st.sampled_from([ASKED, ANSWER, "```python\nx", "「", "<br>", LONG])}),
    max_size=5)  # fmt: skip
SCHEMA = {"id": pl.String, "messages": pl.List(pl.Struct({"role": pl.String, "content": pl.String}))}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | messages, max_size=6))
def test_any_frame_of_conversations_gets_a_review(chats):
    frame = pl.DataFrame([{"id": str(number), "messages": chat} for number, chat in enumerate(chats)], schema=SCHEMA)
    found = review(frame, against=[{"id": "set/0", "text": "日本の首都はどこにあるか、理由とともに述べてください。"}])
    assert found.facts["rows"] == len(chats) and found.table["finding"].to_list() == list(FINDINGS)
    assert (found.table["count"] <= found.table["of"]).all() and (found.table["of"] <= len(chats)).all()
    assert set(found.marks["id"]) <= set(frame["id"]) and found.marks.select(pl.struct("id", "finding").n_unique()).item() == found.marks.height
    assert (found.marks["evidence"].str.len_chars() <= 200).all()
    assert found.report().startswith("# Review")
    json.dumps(found.facts, allow_nan=False)


anything = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from([ASKED, "", "[{", "\n\nHuman: a\n\nAssistant: b"]),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text"]), inner, max_size=3))
FIELDS = ["messages", "conversations", "prompt", "chosen", "rejected", "instruction", "input", "output", "response", "text", "system", "licence", "id"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=5) | anything, min_size=1, max_size=4))
def test_any_json_lines_are_read_or_refused_in_one_line(tmp_path_factory, rows):
    path = write_rows(tmp_path_factory.mktemp("rows") / "a.jsonl", [json.dumps(row) for row in rows])
    try:
        read, turns = read_set(path)
    except ShisaError as error:
        assert "\n" not in str(error)
        return
    assert read.height == len(rows) and set(turns["row"]) <= set(read["row"]) and turns["text"].null_count() == 0


@pytest.mark.parametrize("text", ["あいうえお" * 8000, "a" * 40_000, "（" * 40_000, "a." * 20_000, "「あ" * 20_000, "x = (" * 8000, "です。である" * 8000])
def test_long_turns_take_no_square(text):
    begun = time.process_time()
    review(pl.DataFrame([talk(ASKED, text)]), against=[])
    assert time.process_time() - begun < 5


@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_checks_never_raise_on_any_text(text):
    for check in CHECKS.values():
        assert isinstance(check(text, text[::-1]), str)
    assert isinstance(english_clause(text) + third_language(text) + unpaired(text), str) and len(styles(text)) == 2


def test_the_same_bytes_in_any_hash_order(tmp_path):
    import subprocess
    import sys

    frame = pl.DataFrame([talk(ASKED, "東京は首都である。人口も多いです。", id="b"), talk("首都は？", "東京,大阪です。", id="a")])
    frame.write_parquet(tmp_path / "a.parquet")
    code = "import sys; from pathlib import Path; from shisa.review import review; review(sys.argv[1], against=[]).write(Path(sys.argv[2]))"
    written = []
    for seed in ("0", "1"):
        out = tmp_path / seed
        out.mkdir()
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.parquet"), str(out)], env=os.environ | {"PYTHONHASHSEED": seed}, check=True, timeout=120)
        written.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    assert written[0] == written[1] and set(written[0]) == {"review.parquet", "findings.parquet", "report.md"}


@pytest.mark.shared
def test_translated_set_agrees_with_the_study(data_folder):
    study = json.loads((Path(chapter.__file__).parents[1] / "nbs" / "studies" / "review_dolly_ja.json").read_text(encoding="utf-8"))
    found = review(data_folder / "parallel" / "dolly_ja", against=[])
    counts = dict(found.table.select("finding", "count").rows())
    assert found.facts["rows"] == study["facts"]["rows"] == 12000
    assert {row["finding"]: row["count"] for row in study["findings"] if row["finding"] != "benchmark item"} == {
        name: count for name, count in counts.items() if name != "benchmark item"}
