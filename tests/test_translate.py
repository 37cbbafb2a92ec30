"""Chapter 41: what is sent, the paths of a turn that fails, the stage under kills, caps and injections, and a real local server."""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import answers_in, shisa
from hypothesis import given
from hypothesis import strategies as st
from injections import INJECTIONS
from shisa import translate
from shisa.bundled import MARKED, Rates, bundled_server, bundled_texts
from shisa.config import ShisaError, SpendCapReached
from shisa.sample import conversations
from shisa.stage import run_stage
from shisa.store import Answer
from shisa.translate import Config, Log, SetSpec, outcome, parts, request_messages, translate_conversation
from shisa.validate import check

SECRET = "sk-test-0123456789abcdefSECRET"
JAPANESE = {"What is a lichen?": "地衣類とは何ですか。", "A fungus and an alga that live as one.": "菌類と藻類が一体になって暮らす生き物です。",
            "Where does it grow?": "どこに生えますか。", "On stones and on trees.": "石や木の上に生えます。"}
CHAT = {"id": "c", "kind": "fact", "source": "s", "licence": "MIT", "messages": [
    {"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, JAPANESE, strict=True)]}


# what is sent


@given(st.lists(st.sampled_from(["word", "```", "```\ncode", "", "長い段落です。" * 5, "\n"]), max_size=12), st.integers(1, 60))
def test_parts_lose_nothing_and_never_cut_code(blocks, limit):
    text = "\n\n".join(blocks)
    found = parts(text, limit)
    assert "\n\n".join(found) == text
    assert all(part.count("```") % 2 == 0 for part in found[:-1])


@given(st.text(max_size=300), st.text(max_size=100))
def test_the_marked_text_is_the_text_whatever_it_holds(source, earlier):
    asked = request_messages(source, "user", [("user", earlier, "訳")])
    assert MARKED.search(asked[-1]["content"]).group(2) == source
    assert [message["role"] for message in asked] == ["system", "user"]


# the paths of a turn


class Scripted:
    """A client that answers by the text: {text: answers, one for each time it is asked}; a missing text gets its translation."""

    def __init__(self, answers):
        self.answers, self.asked = {text: list(each) for text, each in answers.items()}, []

    async def ask(self, model, messages, seed=0, temperature=0.0, max_tokens=None):
        found = MARKED.search(messages[-1]["content"])
        text = found.group(2) if found else messages[-1]["content"]
        self.asked.append((text, model, seed, temperature))
        answer = self.answers[text].pop(0) if self.answers.get(text) else JAPANESE[text]
        return answer if isinstance(answer, Answer) else Answer(answer, prompt_tokens=10, completion_tokens=5)


def translated(answers, chat=CHAT, **changes):
    """What becomes of a conversation: (messages, origin, reason), rows, log, and what was asked."""
    config = Config(first="small", stronger="large", **{"attempts": 2, "stronger_attempts": 1, **changes})
    client = Scripted(answers)
    rows, log = asyncio.run(translate_conversation(client, config, chat))
    return outcome(rows, config), rows, log, client.asked


def test_a_good_conversation_is_asked_for_once_and_paid_for_once():
    (messages, origin, _), rows, log, asked = translated({})
    assert [m["content"] for m in messages] == list(JAPANESE.values()) and origin == "translated"
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2 and len(asked) == 4
    assert log.used[("small", "first")] == {"answers": 4, "prompt_tokens": 40, "completion_tokens": 20} and not log.refused


def test_a_refused_answer_is_asked_for_again_then_of_the_stronger_model():
    question = "What is a lichen?"
    (messages, origin, _), rows, log, asked = translated({question: [question, ""]})
    assert origin == "stronger" and rows[0].model == "large" and rows[0].attempts == 3
    assert rows[0].reasons == "untranslated; empty" and [r.reason for r in log.refused] == ["untranslated", "empty"]
    assert [a[1:] for a in asked[:3]] == [("small", 0, 0.0), ("small", 1, 0.3), ("large", 0, 0.0)]


def test_a_reply_that_nobody_translates_is_written_anew():
    reply, question = "On stones and on trees.", "どこに生えますか。"
    (messages, origin, _), rows, _, asked = translated({reply: [reply] * 3, question: ["岩や木の幹に生えることが多いです。"]})
    assert origin == "backfilled" and messages[-1]["content"] == "岩や木の幹に生えることが多いです。"
    assert rows[-1].status == "backfilled" and rows[-1].model == "large" and len(messages) == 4


@pytest.mark.parametrize(("path", "length", "origin"), [("backfill", 2, "shortened"), ("shorten", 2, "shortened"), ("drop", 0, "")])
def test_a_question_that_nobody_translates_shortens_or_drops_the_conversation(path, length, origin):
    question = "Where does it grow?"
    (messages, found, reason), rows, _, _ = translated({question: [question] * 3}, on_failure=path)
    assert len(messages) == length and found == origin and (reason == "untranslated") == (length == 0)
    assert [row.status for row in rows] == ["translated", "translated", "failed", "skipped"]


def test_the_first_question_that_nobody_translates_drops_the_conversation_with_its_reason():
    question = "What is a lichen?"
    (messages, _, reason), rows, _, _ = translated({question: [question] * 2 + [""]})
    assert messages == [] and reason == "empty" and [row.status for row in rows] == ["failed"] + ["skipped"] * 3


def test_code_is_put_back_and_code_alone_is_not_sent():
    chat = {**CHAT, "messages": [{"role": "user", "content": "Run `ls -l` in {folder}, please."}, {"role": "assistant", "content": "```\nls -l\n```"}]}
    (messages, origin, _), rows, _, asked = translated({"Run `ls -l` in {folder}, please.": ["{フォルダー}で`ＬＳ－ｌ`を実行してください。"]}, chat)
    assert messages[0]["content"] == "{folder}で`ls -l`を実行してください。" and origin == "restored"
    assert messages[1]["content"] == "```\nls -l\n```" and rows[1].status == "kept" and len(asked) == 1


def test_a_long_turn_is_sent_in_parts_and_is_whole_again():
    text = "\n\n".join(list(JAPANESE)[:1] + list(JAPANESE)[2:3])
    chat = {**CHAT, "messages": [{"role": "user", "content": text}, CHAT["messages"][1]]}
    client, config = Scripted({}), Config.model_construct(**{**Config(first="small", stronger="large").model_dump(), "part_characters": 20})
    rows, _ = asyncio.run(translate_conversation(client, config, chat))
    assert [(row.turn, row.part) for row in rows] == [(0, 0), (0, 1), (1, 0)]
    assert outcome(rows, config)[0][0]["content"] == "地衣類とは何ですか。\n\nどこに生えますか。"


# the stage

QUICK = {"timeout_seconds": 0.7}
CHILD = """
import sys
from shisa.stage import run_stage
from shisa.translate import Config
run_stage("41_translate", "tiny", sys.argv[1], config=Config(timeout_seconds=0.7))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    return run_stage("41_translate", "tiny", out, config=Config(**QUICK))


def test_everything_that_can_happen_happens(undisturbed):
    metrics = undisturbed.metrics
    assert min(metrics["refused"].values()) > 0 and {"timeout", "empty", "untranslated", "chatty", "looping", "answered"} <= {*metrics["refused"]}
    assert {"translated", "stronger", "kept"} <= {*metrics["texts"]}
    assert metrics["retried"] > 0 and metrics["differs_from_reference"] <= 3
    assert sum(row["answers"] for row in metrics["models"]) > sum(metrics["texts"].values())
    assert all(row["usd"] == 0 for row in metrics["models"])
    assert undisturbed.table("translations").height == sum(len(chat["messages_en"]) for chat in conversations())
    rejects = undisturbed.table("rejects")
    assert rejects.height == sum(metrics["refused"].values()) + sum(undisturbed.counts["dropped"].values())
    kept = undisturbed.table("conversations")
    assert kept.height == undisturbed.counts["kept"] == sum(metrics["conversations"].values())
    roles = {chat["id"]: [m["role"] for m in chat["messages_ja"]] for chat in conversations()}
    for row in kept.iter_rows(named=True):
        got = [m["role"] for m in row["messages"]]
        assert got == roles[row["id"]][: len(got)] and (len(got) == len(roles[row["id"]])) == (row["origin"] != "shortened")
        assert [m["role"] for m in row["original"]] == got


def test_killed_in_the_middle_goes_on_and_ends_with_the_same_bytes(undisturbed, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.DEVNULL)
    store, deadline = tmp_path / "store" / "answers.sqlite", time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None and answers_in(store) < 60:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert answers_in(store) >= 60 and not (tmp_path / "41_translate").exists()
    resumed = run_stage("41_translate", "tiny", tmp_path, config=Config(concurrency=5, **QUICK))
    for name in undisturbed.manifest["files"]:
        assert resumed.file(name).read_bytes() == undisturbed.file(name).read_bytes(), name
    assert resumed.metrics == undisturbed.metrics


def test_no_endpoint_is_one_line_and_nothing_is_left(tmp_path, monkeypatch):
    for name in ("SHISA_FIRST_BASE_URL", "SHISA_STRONGER_BASE_URL", "SHISA_FIRST_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    config = Config(translator="openai", first="m", stronger="m")
    with pytest.raises(ShisaError, match="SHISA_FIRST_BASE_URL"):
        run_stage("41_translate", "tiny", tmp_path, config=config)
    monkeypatch.setenv("SHISA_FIRST_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(ShisaError, match="http://127.0.0.1:9"):
        run_stage("41_translate", "tiny", tmp_path, config=config)
    monkeypatch.setenv("SHISA_FIRST_BASE_URL", "localhost")
    with pytest.raises(ShisaError, match="is no URL"):
        run_stage("41_translate", "tiny", tmp_path, config=config)
    assert not (tmp_path / "41_translate").exists()


def test_the_key_is_found_nowhere(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with bundled_server(Rates(spoilt=0.3, error=0.3)) as url:
        monkeypatch.setenv("SHISA_FIRST_BASE_URL", url)
        small = Config(translator="openai", sources=(SetSpec(name="sample", limit=8),))
        run_stage("41_translate", "tiny", tmp_path, config=small)
    found = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    said = capfd.readouterr()
    assert not found and SECRET not in said.out + said.err and os.environ["OPENAI_API_KEY"] == SECRET
    assert answers_in(tmp_path / "store" / "answers.sqlite") > 8


def test_a_model_that_only_fails_is_one_line(tmp_path):
    with pytest.raises(ShisaError, match="none of 3 conversations"):
        run_stage("41_translate", "tiny", tmp_path, config=Config(spoilt=1.0, slow=0.0, sources=(SetSpec(name="sample", limit=3),)))


def test_the_cap_stops_and_a_higher_cap_goes_on(tmp_path):
    few = {"sources": (SetSpec(name="sample", limit=12),), "spoilt": 0.0, "slow": 0.0, **QUICK}
    with pytest.raises(SpendCapReached, match="SHISA_CAP_TOKENS"):
        run_stage("41_translate", "tiny", tmp_path, config=Config(cap_tokens=12_000, **few))
    before = answers_in(tmp_path / "store" / "answers.sqlite")
    assert 0 < before < 24 and not (tmp_path / "41_translate").exists()
    done = run_stage("41_translate", "tiny", tmp_path, config=Config(cap_tokens=10_000_000, **few))
    assert done.counts["kept"] == 12 and answers_in(tmp_path / "store" / "answers.sqlite") > before


def test_the_command_says_the_bill_and_stops_at_the_cap_with_a_code_of_its_own(tmp_path):
    rows = tmp_path / "mine.jsonl"
    chat = next(chat for chat in conversations() if len(chat["messages_en"]) == 2)
    import json

    rows.write_text(json.dumps({"id": "a", "licence": "MIT", "messages": chat["messages_en"]}) + "\n")
    with bundled_server(Rates()) as url:
        env = {"SHISA_FIRST_BASE_URL": url, "SHISA_FIRST_MODEL": "shisa-bundled", "OPENAI_API_KEY": SECRET}
        bill = shisa("translate", rows, "--out", tmp_path / "out", "--dry-run", env=env)
        assert bill.returncode == 0 and "requests" in bill.stdout and "USD" in bill.stdout, bill.stderr
        capped = shisa("translate", rows, "--out", tmp_path / "out", "--cap-tokens", "100", env=env)
        assert capped.returncode == 3 and "cap" in capped.stderr and capped.stderr.count("\n") == 1
        done = shisa("translate", rows, "--out", tmp_path / "out", "--cap-tokens", "1000000", env=env)
        assert done.returncode == 0, done.stderr
    assert SECRET not in bill.stdout + capped.stderr + done.stdout + done.stderr
    lost = shisa("translate", tmp_path / "none.jsonl", "--out", tmp_path / "out", env=env)
    assert lost.returncode == 2 and lost.stderr.count("\n") == 1


# injected instructions


@pytest.mark.parametrize("item", INJECTIONS, ids=lambda item: item["id"])
def test_an_injected_instruction_changes_nothing(item):
    other = "en" if item["lang"] == "ja" else "ja"
    direction = f"{item['lang']}-{other}"
    asked = request_messages(item["source"], "user", [("user", item["source"], item["faithful"])], direction)
    plain = request_messages("Hello.", "user", [("user", "Hello.", "こんにちは。")], direction)
    assert MARKED.search(asked[1]["content"]).group(2) == item["source"]  # the text is the text
    assert asked[0] == plain[0] and len(asked) == len(plain)  # what the model is told is the same
    assert check(item["source"], item["obeyed"], item["lang"], other), "an answer in place of a translation must be refused"
    assert check(item["source"], item["faithful"], item["lang"], other) == [], "a faithful translation must pass"


def test_a_model_that_obeys_is_refused_and_asked_again():
    item = next(item for item in INJECTIONS if item["lang"] == "en")
    chat = {**CHAT, "messages": [{"role": "user", "content": item["source"]}, CHAT["messages"][1]]}
    (messages, origin, _), rows, log, asked = translated({item["source"]: [item["obeyed"], item["faithful"]]}, chat)
    assert messages[0]["content"] == item["faithful"] and rows[0].attempts == 2 and len(asked) == 3


# a real server


@contextmanager
def served(model: Path):
    """`transformers serve` with a model folder, on a free port; yields the base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache = model.parent / "no-hub"
    cache.mkdir(exist_ok=True)
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = open(model.parent / "serve.log", "wb")  # noqa: SIM115
    server = subprocess.Popen(command, env={**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2).read()
                break
            except OSError:
                assert server.poll() is None, (model.parent / "serve.log").read_text()[-2000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.mark.slow
def test_the_runs_own_model_translates_behind_a_real_server_and_is_asked_once(finished_run, tmp_path, monkeypatch):
    pytest.importorskip("uvicorn", reason="transformers serve needs the extra [serve]")
    model, counts = tmp_path / "model", []
    shutil.copytree(finished_run / "51_sft" / "model", model)
    with served(model) as url:
        monkeypatch.setenv("SHISA_FIRST_BASE_URL", url)
        config = Config(translator="openai", first=str(model), stronger=str(model), sources=(SetSpec(name="sample", limit=4),), attempts=2,
                        max_tokens=24, concurrency=4, timeout_seconds=120)
        for _ in range(2):
            try:
                counts.append(sum(run_stage("41_translate", "tiny", tmp_path / "out", config=config, rebuild=True).metrics["refused"].values()))
            except ShisaError as error:  # a model of 128 dimensions may fail at all of them, and then says so
                counts.append(int(re.search(r"none of 4 conversations .*\(most often: \w+, (\d+) answers\)", str(error))[1]))
            shutil.rmtree(tmp_path / "out" / "41_translate", ignore_errors=True)
        asked = (tmp_path / "serve.log").read_text().count("POST /v1/chat/completions")
    assert counts[0] == counts[1] > 0 and asked == answers_in(tmp_path / "out" / "store" / "answers.sqlite") >= 8
