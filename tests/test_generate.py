"""Instructions written as Japanese: the list reader, the checks, the index of likeness, and the stage under faults."""
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shisa import generate
from shisa.bundled import BUNDLED, BUNDLED_STRONGER, STRAY, Rates, bundled_server, replies, rewordings
from shisa.config import ShisaError, SpendCapReached
from shisa.evalsets import read_bytes
from shisa.generate import CATEGORIES, Config, bill, draw_topics, existing_texts, list_messages, topics
from shisa.novelty import PATTERNS, SimilarityIndex, check_instruction, parse_list
from shisa.sample import data_folder, instructions, japanese
from shisa.stage import run_stage
from shisa.store import AnswerStore

TABLES = ("conversations.parquet", "instructions.parquet", "rejects.parquet")
QUICK = {"slow": 0.0, "wanted": 2}

# the reader

LINE = st.text(st.sampled_from("あいうえお漢字かな。、？1234.・「」ABC "), min_size=2, max_size=30).map(str.strip)
ENTRY = st.lists(LINE, min_size=1, max_size=4).map("\n".join).map(str.strip).filter(lambda text: text and not text.startswith("「"))


@given(st.lists(ENTRY, min_size=1, max_size=12), st.sampled_from(["", "承知しました。\n\n", "以下の通りです：\n"]), st.sampled_from(["\n", " ", "\n\n"]))
@settings(max_examples=200, deadline=None)
def test_the_form_that_was_asked_for_is_read_whole(entries, preamble, gap):
    text = preamble + "\n\n".join(f"【指示{n}】{gap}{entry}" for n, entry in enumerate(entries, 1))
    assert parse_list(text) == entries
    assert parse_list(text, cut=True) == entries[:-1]


@given(st.lists(ENTRY, min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_json_is_read_whole(entries):
    assert parse_list(json.dumps(entries, ensure_ascii=False)) == entries
    assert parse_list("```json\n" + json.dumps([{"instruction": e} for e in entries], ensure_ascii=False, indent=1) + "\n```") == entries


@given(st.lists(st.text(st.sampled_from("あいうえお漢字。、？"), min_size=2, max_size=30), min_size=2, max_size=25), st.sampled_from(["{}. ", "{}）", "({}) ", "{}．"]))
@settings(max_examples=200, deadline=None)
def test_numbered_lists_are_read_along_their_own_numbers(entries, form):
    assert parse_list("\n".join(form.format(n) + entry for n, entry in enumerate(entries, 1))) == entries
    inside = [f"{entry}\n1. 甲\n2. 乙" if n > 2 else entry for n, entry in enumerate(entries)]
    assert parse_list("\n".join(form.format(n) + entry for n, entry in enumerate(inside, 1))) == inside


@given(st.text(max_size=300), st.booleans())
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_the_reader_or_the_checks(text, cut):
    for entry in parse_list(text, cut):
        assert entry.strip() == entry and entry
        check_instruction(entry)


def test_refusals_are_no_list():
    for text in ("申し訳ありませんが、作成できません。", "", "はい。", "I'm sorry, but I can't help with that."):
        assert parse_list(text) == []


# the checks

def test_every_planted_entry_is_refused_for_its_reason():
    for reason, texts in STRAY.items():
        assert {check_instruction(text).reason for text in texts} == {reason}
    rows = [row["instruction"] for row in instructions()]
    assert check_instruction(f"{rows[0]}\n指示2：{rows[1]}").reason == "leftover"
    assert check_instruction("1. 猫について俳句を詠んでください。").reason == "leftover"
    assert check_instruction("あ" * 2000).reason == "too_long"
    for text in ("この文章から年号を抜き出してください。", "本文から登場人物を挙げてください。", "映画「春の海」の題を、与えられた文章から抜き出してください。", "次の記事の要点を三つにまとめてください。"):
        assert check_instruction(text).reason == "missing"
    for text in ("次の文章を要約してください。\n\nこの写真を見るたびに、祖母を思い出す。添付した画像を見ても、声までは聞こえない。", "この文章の題を考えてください。\n\n朝、窓を開けると雪だった。"):
        assert check_instruction(text) is None


@pytest.mark.parametrize("text", [
    "資料を添付したことを伝えるメールを、課長あてに書いてください。", "次の文化祭の出し物の案を五つ考えてください。", "Pythonのリスト内包表記を説明してください。",
    "「I can't believe it.」は、日本語ではどう言えば自然ですか。", "次の言葉を使って短歌を詠んでください。「朝顔」「窓」", "写真をきれいに撮るコツを三つ教えてください。",
    "ログインができません。考えられる原因を順に挙げてください。", "次の文を敬語に直してください：明日そっちに行くから待ってて。", "あなたは旅館の番頭です。客を迎えてください。",
    "ChatGPTのような道具を、高校の授業でどう使えばよいですか。", "次の数を小さい順に並べてください： 8, 5, 2", "『Laws of the Game』とは何の規則ですか。やさしく教えてください。",
    "次の文を短くしてください。\n\n私は昨日、友達と一緒に、駅前に新しくできた店へ行きました。", "地図の読み方を、初めて山に登る人に教えてください。",
])
def test_good_instructions_pass(text):
    assert check_instruction(text) is None


def test_the_sample_and_its_second_wordings_pass():
    for row in instructions():
        assert all(check_instruction(text) is None for text in (row["instruction"], *rewordings(row["instruction"])))


@pytest.mark.shared
def test_checks_on_instructions_that_were_not_made_for_them():
    rows = [json.loads(line) for line in read_bytes(data_folder() / "parallel" / "dolly_ja" / "dolly_ja.jsonl").split(b"\n") if line]
    reasons = Counter(refusal.reason for row in rows if (refusal := check_instruction(f"{row['instruction']}\n\n{row['input'] or ''}".strip())))
    assert (reasons.total() - reasons["too_long"]) / len(rows) <= 0.01
    speak = re.compile("文章|本文|段落|パラグラフ|テキスト|パッセージ|記事|以下|次の")
    bare = [check_instruction(row["instruction"]) for row in rows if row["input"] and speak.search(row["instruction"])]
    assert sum(refusal is not None and refusal.reason == "missing" for refusal in bare) / len(bare) >= 0.8
    whole = [check_instruction(row["instruction"]) for row in rows if not row["input"]]
    assert sum(refusal is not None and refusal.reason == "missing" for refusal in whole) / len(whole) <= 0.002


@pytest.mark.shared
def test_share_of_other_peoples_instructions_that_are_too_alike():
    rows = [json.loads(line) for line in read_bytes(data_folder() / "parallel" / "dolly_ja" / "dolly_ja.jsonl").split(b"\n") if line]
    index, alike = SimilarityIndex(), 0
    texts = [row["instruction"] for row in rows if not row["input"] and len(row["instruction"]) >= 6]
    for number, text in enumerate(texts):
        alike += index.nearest(text)[0] >= Config().threshold
        index.add(str(number), text)
    assert 0.05 < alike / len(texts) < 0.12


# likeness

def jaccard(a, b):
    return len(a & b) / len(a | b) if a | b else 0.0


@given(st.integers(0, 10_000), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_the_index_equals_brute_force(seed, count):
    draw, text = random.Random(seed), "".join(row["ja"] for row in japanese()[:20])

    def piece():
        start = draw.randrange(len(text) - 60)
        return text[start : start + draw.randint(1, 60)]

    index, texts = SimilarityIndex(), [piece() for _ in range(count)]
    for number, each in enumerate(texts):
        index.add(str(number), each)
    for query in [piece() for _ in range(10)] + texts[:3]:
        wanted = [jaccard(set(index.grams(query)), set(index.grams(each))) for each in texts]
        likeness, id = index.nearest(query)
        assert likeness == pytest.approx(max(wanted))
        assert id == (str(max(range(count), key=lambda n: (wanted[n], -n))) if max(wanted) > 0 else "")


def test_spelling_and_politeness_do_not_hide_a_copy():
    index = SimilarityIndex()
    for row in instructions():
        index.add(row["id"], row["instruction"])
    for row in instructions():
        for text in (*rewordings(row["instruction"]), row["instruction"].replace("、", " "), row["instruction"].replace("。", "！")):
            likeness, id = index.nearest(text)
            assert likeness >= Config().threshold and id == row["id"]
    assert index.nearest("zzzz")[0] == 0.0


# prompts and topics

def test_every_category_has_its_prompt_and_topics_differ():
    drawn = [tuple(draw_topics(category, batch, 10, 0)) for category in CATEGORIES for batch in range(20)]
    assert len(set(drawn)) == len(drawn) and all(len(set(each)) == 10 for each in drawn)
    assert draw_topics("mail", 3, 10, 0) == draw_topics("mail", 3, 10, 0) != draw_topics("mail", 3, 10, 1)
    assert len(topics()) == 20 and sum(map(len, topics().values())) > 300
    for category in CATEGORIES:
        system, user = list_messages(category, 0, 10, 0)
        assert f"分類：{category}　件数：10" in user["content"] and "{" not in user["content"] and len(system["content"]) > 300
    assert {row["category"] for row in instructions()} == set(CATEGORIES)


def test_what_exists_holds_conversations_pairs_and_evaluation_items():
    kinds = Counter(id.partition(":")[0] for id, _ in existing_texts(None))
    assert set(kinds) == {"conversation", "preference", "evaluation"} and min(kinds.values()) > 40


# the stage

CHILD = """
import sys
from shisa.generate import Config
from shisa.stage import run_stage
run_stage("42_generate", "tiny", sys.argv[1], config=Config(slow=0.0, wanted=2))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run_stage("42_generate", "tiny", tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run_stage("42_generate", "tiny", tmp_path_factory.mktemp("quick"), config=Config(**QUICK))


def test_categories_are_full_and_every_reason_occurs(undisturbed):
    metrics, config = undisturbed.metrics, Config()
    chats, rows = undisturbed.table("conversations.parquet"), undisturbed.table("instructions.parquet")
    assert dict(chats["kind"].value_counts().iter_rows()) == dict.fromkeys(CATEGORIES, config.wanted)
    assert undisturbed.counts["in"] == rows.height and undisturbed.counts["kept"] == chats.height == config.wanted * len(CATEGORIES)
    assert set(metrics["refused"]) == {*PATTERNS, "too_short", "not_japanese", "missing", "similar", "evaluation", "surplus", "unanswered"}
    assert {"empty", "truncated", "looping", "wrong_language", "refused"} <= set(metrics["replies_refused"])
    assert {"timeout", "truncated"} <= set(metrics["lists_refused"]) and set(metrics["answered_at"]) == {"try 1", "try 2", "stronger"}
    differs = 0
    for row in chats.iter_rows(named=True):
        asked, said = row["messages"]
        assert (asked["role"], said["role"]) == ("user", "assistant")
        differs += said["content"] != replies()[asked["content"]]
        assert row["source"] == row["origin"] == "generated" and row["licence"] == "Apache-2.0"
    assert differs == metrics["differs_from_sample"] <= 2
    kept = rows.filter(rows["status"] == "kept")
    assert (kept["similarity"] < config.threshold).all() and (rows.filter(rows["reason"] == "similar")["similarity"] >= config.threshold).all()
    roles = {(row["model"], row["role"]) for row in metrics["models"]}
    assert roles == {(BUNDLED, "instructions"), (BUNDLED, "first"), (BUNDLED_STRONGER, "stronger")}
    assert all(set(row) == {"model", "role", "answers", "prompt_tokens", "completion_tokens", "usd"} and row["usd"] == 0 for row in metrics["models"])
    rejects = undisturbed.table("rejects.parquet")
    assert rejects.height == sum(map(sum, (metrics[name].values() for name in ("refused", "replies_refused", "lists_refused"))))


@pytest.mark.parametrize("concurrency", [1, 16])
def test_the_bytes_do_not_depend_on_concurrency(quick, tmp_path, concurrency):
    again = run_stage("42_generate", "tiny", tmp_path, config=Config(concurrency=concurrency, **QUICK))
    assert [again.file(name).read_bytes() for name in TABLES] == [quick.file(name).read_bytes() for name in TABLES]
    assert again.metrics == quick.metrics


def test_killed_in_the_middle_goes_on_and_ends_with_the_same_bytes(quick, tmp_path):
    stored, lives = 0, 0
    for wanted in (15, 50):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while stored < wanted and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
            if (tmp_path / "store" / "answers.sqlite").is_file():
                try:
                    store = AnswerStore(tmp_path / "store" / "answers.sqlite")
                    stored = store.totals()["answers"]
                    store.close()
                except ShisaError:
                    continue
        lives += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert lives == 2 and not (tmp_path / "42_generate").exists()
    resumed = run_stage("42_generate", "tiny", tmp_path, config=Config(concurrency=5, **QUICK))
    assert [resumed.file(name).read_bytes() for name in TABLES] == [quick.file(name).read_bytes() for name in TABLES]
    assert resumed.metrics == quick.metrics


def test_the_cap_stops_it_and_a_higher_one_goes_on(quick, tmp_path):
    with pytest.raises(SpendCapReached, match="SHISA_CAP_TOKENS"):
        run_stage("42_generate", "tiny", tmp_path, config=Config(cap_tokens=30_000, **QUICK))
    store = AnswerStore(tmp_path / "store" / "answers.sqlite")
    before = store.totals()
    store.close()
    assert 0 < before["answers"] and before["prompt_tokens"] + before["completion_tokens"] <= 30_000
    after = run_stage("42_generate", "tiny", tmp_path, config=Config(cap_tokens=10_000_000, **QUICK))
    assert [after.file(name).read_bytes() for name in TABLES] == [quick.file(name).read_bytes() for name in TABLES]
    used = sum(row["prompt_tokens"] + row["completion_tokens"] for row in after.metrics["models"])
    store = AnswerStore(tmp_path / "store" / "answers.sqlite")
    assert store.totals()["prompt_tokens"] + store.totals()["completion_tokens"] == used  # nothing was paid for twice
    store.close()


def test_a_category_that_does_not_fill_stops_the_stage_aloud(tmp_path):
    config = Config(categories=("math",), wanted=6, slow=0.0, spoilt=0.0, patience=2)
    with pytest.raises(ShisaError, match=r"math has 5 of 6 after 4 batches \(similar \d+\); raise patience"):
        run_stage("42_generate", "tiny", tmp_path, config=config)
    with pytest.raises(ShisaError, match="no prompt generate/poetry"):
        run_stage("42_generate", "tiny", tmp_path, config=Config(categories=("poetry",)))
    assert not (tmp_path / "42_generate").exists()


def test_any_endpoint_serves_and_its_key_is_found_nowhere(tmp_path, monkeypatch, capfd):
    secret = "sk-secret-0123456789abcdef"
    with bundled_server(Rates(spoilt=0.2, error=0.2)) as url:
        for name, value in {"SHISA_FIRST_BASE_URL": url, "SHISA_FIRST_MODEL": BUNDLED, "SHISA_STRONGER_MODEL": BUNDLED_STRONGER, "OPENAI_API_KEY": secret}.items():
            monkeypatch.setenv(name, value)
        for name in ("SHISA_STRONGER_BASE_URL", "SHISA_FIRST_API_KEY", "SHISA_STRONGER_API_KEY"):
            monkeypatch.delenv(name, raising=False)
        config = generate.config("a100x16").change(wanted=2, batch_size=4, patience=8, evaluation="bundled", categories=("mail", "plan"))
        artifact = run_stage("42_generate", "tiny", tmp_path, config=config)
    assert artifact.counts["kept"] == 4 and artifact.table("conversations.parquet")["licence"][0] == f"output of {BUNDLED}, {BUNDLED_STRONGER}"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    said = capfd.readouterr()
    assert secret not in said.out + said.err


def test_the_bill_is_known_before_anything_is_sent(tmp_path):
    config = Config()
    told = bill(config, tmp_path)
    assert {row["model"]: row["requests"] for row in told.rows} == {BUNDLED: 15 * 1 + 15 * config.wanted}
    assert told.usd == 0 and all(row["prompt_tokens"] > 0 for row in told.rows)
