"""The store, the wire and the client, against a real server that misbehaves (fault_server.py), and under SIGKILL."""

import asyncio
import gc
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections import Counter
from contextlib import aclosing
from email.utils import format_datetime, formatdate
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest
from fault_server import fault_server, reply_to
from hypothesis import given, settings
from hypothesis import strategies as st
from shisa.client import Client, Endpoint, Progress, endpoints_from_environment, map_bounded
from shisa.config import ShisaError, SpendCapReached
from shisa.store import Answer, AnswerStore, Spend, about_tokens, caps_from_environment, most_prompt_tokens, price
from shisa.wire import LONGEST_WAIT, Line, backoff, read_answer, retry_after

SECRET = "sk-test-0123456789abcdefSECRET"
TESTS = Path(__file__).parent
anything = st.text(st.characters(codec="utf-8"), max_size=200)


@pytest.fixture
def store(tmp_path):
    with_answers = AnswerStore(tmp_path / "answers.sqlite")
    yield with_answers
    with_answers.close()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "SHISA_PRICE", "SHISA_CAP_USD", "SHISA_CAP_TOKENS", "SHISA_FIRST_BASE_URL", "SHISA_STRONGER_BASE_URL",
                 "SHISA_FIRST_API_KEY", "SHISA_STRONGER_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def user(text):
    return [{"role": "user", "content": str(text)}]


def run(work):
    """asyncio.run, and nothing may be left behind: no task, no exception that nobody heard."""
    unheard = []

    async def watched():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
        try:
            return await work
        finally:
            await asyncio.sleep(0)
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            assert not left, left
            gc.collect()

    try:
        return asyncio.run(watched())
    finally:
        gc.collect()
        assert not unheard, unheard


def ask(url, store, texts=("Hello",), check=False, spend=None, said=None, **options):
    """Ask model m for the texts, in order."""

    async def go():
        urls = [url] if isinstance(url, str) else url
        options.setdefault("timeout_seconds", 2)
        options.setdefault("backoff_seconds", 0.01)
        say = (said if said is not None else []).append
        async with Client(store, {"m": [Endpoint(one) for one in urls]}, spend, say=say, **options) as client:
            if check:
                await client.check()
            return [answer async for _, answer in map_bounded(lambda text: client.ask("m", user(text)), texts, client.concurrency)]

    return run(go())


# the store


@given(anything, anything)
@settings(max_examples=30)
def test_what_is_put_is_got_byte_for_byte_and_the_first_answer_stays(tmp_path_factory, text, other):
    store = AnswerStore(tmp_path_factory.mktemp("store") / "a.sqlite")
    answer = Answer(text + "\0\u2028", "length", 3, 5, True)
    store.put("k", answer, "m", 0.5)
    store.put("k", Answer(other), "m", 0.5)
    assert store.get("k") == answer and store.get("other") is None
    assert {name: store.totals()[name] for name in ("answers", "prompt_tokens", "completion_tokens", "usd", "estimated")} == {
        "answers": 1, "prompt_tokens": 3, "completion_tokens": 5, "usd": 0.5, "estimated": 1}
    store.close()


@given(st.lists(st.tuples(st.sampled_from(["sending", "unpaid", "keep"]), st.integers(0, 4)), max_size=40))
@settings(max_examples=40)
def test_notes_and_answers_keep_the_books(tmp_path_factory, steps):
    """Sendings that were not taken back, less the one that was answered, are `repeated`, or `open` where there is no answer."""
    store = AnswerStore(tmp_path_factory.mktemp("store") / "a.sqlite")
    notes, answered = Counter(), {}

    async def go():
        for what, key in steps:
            if what == "sending":
                await store.sending(str(key), 100, 1.0)
                notes[key] += 1
            elif what == "unpaid":
                await store.unpaid(str(key))
                notes[key] = max(notes[key] - 1, 0)
            else:
                await store.keep(str(key), Answer("x", "stop", 6, 4), "m", 0.25)
                answered.setdefault(key, max(notes[key] - 1, 0))
                notes[key] = 0

    run(go())
    held = store.totals()
    assert (held["answers"], held["repeated"], held["open"]) == (len(answered), sum(answered.values()), notes.total())
    assert (held["open_usd"], held["open_tokens"], held["repeated_usd"]) == (notes.total(), 100 * notes.total(), 0.25 * held["repeated"])
    store.close()


def test_a_timeout_is_no_answer_to_keep(store):
    with pytest.raises(ValueError, match="timeout"):
        store.put("k", Answer("", "timeout"))


def foreign(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE cats (name)")
    connection.close()


def of_another_version(path):
    AnswerStore(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def torn(path):
    store = AnswerStore(path)
    for number in range(300):
        store.put(str(number), Answer("海" * 100))
    store.close()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 // 4096 * 4096])


def scratched(path):
    torn(path)
    data = bytearray(path.read_bytes())
    data[8192:12288] = bytes(random.Random(1).randbytes(4096))
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [lambda path: path.write_text('{"key": "a"}\n' * 50), foreign, of_another_version, torn, scratched, Path.mkdir])
def test_a_torn_or_foreign_file_is_one_line_with_the_way_out(tmp_path, spoil):
    path = tmp_path / "answers.sqlite"
    spoil(path)
    with pytest.raises(ShisaError, match=r"answers\.sqlite: .*(move the file away|mend the path)") as caught:
        AnswerStore(path)
    assert "\n" not in str(caught.value)


def test_an_empty_file_and_a_torn_tail_of_the_log_are_no_damage(tmp_path):
    path = tmp_path / "a.sqlite"
    path.touch()
    child = f"from shisa.store import *; import os; s = AnswerStore({str(path)!r}); s.put('a', Answer('海')); s.put('b', Answer('山')); os._exit(9)"
    subprocess.run([sys.executable, "-c", child], check=False)
    log = path.with_name("a.sqlite-wal")
    log.write_bytes(log.read_bytes()[:-100])
    store = AnswerStore(path)
    assert store.get("a") == Answer("海") and store.get("b") is None
    store.close()


TWO = """
import sys, time
from shisa.store import Answer, AnswerStore
path, me, start = sys.argv[1], sys.argv[2], float(sys.argv[3])
time.sleep(max(start - time.time(), 0))
store = AnswerStore(path)
for number in range(300):
    store.put(f"shared {number}", Answer(me, "stop", 1, 1), "m", 1.0)
    store.put(f"{me} {number}", Answer(me, "stop", 1, 1), "m", 1.0)
store.close()
"""


def test_two_processes_share_a_store_from_its_first_moment(tmp_path):
    path, start = tmp_path / "a.sqlite", time.time() + 2
    children = [subprocess.Popen([sys.executable, "-c", TWO, str(path), name, str(start)]) for name in "ab"]
    assert [child.wait(timeout=60) for child in children] == [0, 0]
    store = AnswerStore(path)
    assert store.totals()["answers"] == 900 and store.totals()["usd"] == 900
    assert all(store.get(f"{name} {number}").text == name for name in "ab" for number in range(300))
    assert {store.get(f"shared {number}").text for number in range(300)} <= {"a", "b"}
    store.close()


def test_while_another_process_writes_the_loop_goes_on(store):
    other = sqlite3.connect(store.path, isolation_level=None)

    async def go():
        other.execute("BEGIN IMMEDIATE")
        keep, turns = asyncio.ensure_future(store.keep("k", Answer("海"))), 0
        while turns < 20:
            await asyncio.sleep(0.01)
            turns += 1
            assert not keep.done()
        other.execute("COMMIT")
        return await keep

    assert run(go()) == Answer("海") == store.get("k")
    other.close()


def test_many_puts_are_few_transactions(store):
    async def go():
        async for _ in map_bounded(lambda n: store.keep(str(n), Answer("x", "stop", 1, 1), "m", 0.0), range(5_000), 64):
            pass

    run(go())
    assert store.totals()["answers"] == 5_000 and store.commits < 700


# what it costs


def test_prices_and_caps_come_from_the_environment(monkeypatch):
    assert price("gpt-4.1-mini") == price("gpt-4.1-mini-2025-04-14") == (0.4, 1.6) and price("llama") is None
    monkeypatch.setenv("SHISA_PRICE", "org/llama=0.1/0.2, gpt-4.1-mini=1/2")
    assert price("org/llama") == (0.1, 0.2) and price("gpt-4.1-mini") == (1, 2)
    for bad in ("0.1/0.2", "m=1", "m=a/b", "m=-1/2", "m=nan/1"):
        monkeypatch.setenv("SHISA_PRICE", bad)
        with pytest.raises(ShisaError, match="SHISA_PRICE is not readable"):
            price("m")
    assert caps_from_environment() == {"cap_usd": 0.0, "cap_tokens": 0}
    monkeypatch.setenv("SHISA_CAP_USD", "12.5")
    monkeypatch.setenv("SHISA_CAP_TOKENS", "1,000_000")
    assert caps_from_environment() == {"cap_usd": 12.5, "cap_tokens": 1_000_000}
    for variable, bad in (("SHISA_CAP_USD", "much"), ("SHISA_CAP_TOKENS", "1.5"), ("SHISA_CAP_USD", "-1"), ("SHISA_CAP_USD", "nan")):
        with monkeypatch.context() as patch, pytest.raises(ShisaError, match=f"{variable} is no number"):
            patch.setenv(variable, bad)
            caps_from_environment()


@given(anything)
def test_tokens_are_bounded_by_bytes(text):
    assert 0 <= about_tokens(text) <= len(text) + 1 and most_prompt_tokens(user(text)) == 80 + len(text.encode())


# the wire


@given(st.dictionaries(st.sampled_from(["retry-after", "retry-after-ms"]), anything))
def test_any_retry_after_is_a_bounded_wait_or_none(headers):
    found = retry_after(headers, time.time())
    assert found is None or 0 <= found <= LONGEST_WAIT


@given(st.integers(0, 10_000), st.integers(-1000, 1000), st.integers(0, 2**31))
def test_retry_after_in_its_forms(seconds, offset, now):
    assert retry_after({"retry-after": str(seconds)}, now) == min(seconds, LONGEST_WAIT)
    assert retry_after({"retry-after-ms": str(seconds)}, now) == min(seconds / 1000, LONGEST_WAIT)
    date = formatdate(now + offset, usegmt=True)
    assert retry_after({"retry-after": date}, now) == min(max(offset, 0), LONGEST_WAIT)
    elsewhere = format_datetime(datetime.fromtimestamp(now + offset, UTC) + timedelta(0))
    assert retry_after({"retry-after": elsewhere}, now) == min(max(offset, 0), LONGEST_WAIT)


@given(anything, st.integers(1, 60))
def test_backoff_is_bounded_and_the_same_for_the_same_key(key, attempt):
    assert 0 < backoff(key, attempt, 0.25) <= 30 and backoff(key, attempt, 0.25) == backoff(key, attempt, 0.25)


json_like = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | anything, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["choices", "message", "content", "finish_reason", "usage", "prompt_tokens", "completion_tokens"]), inner, max_size=4), max_leaves=12)


@given(st.binary(max_size=50) | json_like.map(orjson.dumps))
def test_no_reply_breaks_the_reader(body):
    answer = read_answer(body, 7)
    assert answer is None or isinstance(answer.text, str) and answer.finish in ("stop", "length", "content_filter")


@pytest.mark.parametrize(("choice", "expected"), [
    ({"message": {"content": "海"}}, Answer("海", "stop", 7, 1, True)),
    ({"message": {"content": "海"}, "finish_reason": "eos_token"}, Answer("海", "stop", 7, 1, True)),
    ({"message": {"content": None}, "finish_reason": "length"}, Answer("", "length", 7, 0, True)),
    ({"message": {"content": None, "refusal": "No."}, "finish_reason": "stop"}, Answer("No.", "content_filter", 7, 1, True)),
    ({"message": {"content": None}}, None), ({"message": {"content": ["海"]}, "finish_reason": "stop"}, None), ({"finish_reason": "stop"}, None)])
def test_what_a_choice_says(choice, expected):
    assert read_answer(orjson.dumps({"choices": [choice]}), 7) == expected


@given(st.lists(st.sampled_from(["hold", "depart", "good"]), max_size=60))
def test_an_endpoint_is_never_held_for_ever(steps):
    line, now = Line(Endpoint("http://127.0.0.1:9/v1")), 100.0
    for step in steps:
        now += 0.01
        {"hold": lambda now=now: line.hold(now, 0.5), "depart": lambda now=now: line.depart(max(line.free_at, now)), "good": lambda now=now: line.good(now)}[step]()
        assert 0 <= line.gap <= 1
    for _ in range(400):
        line.good(now)
    assert line.gap == 0


def test_endpoints_by_role(monkeypatch):
    with pytest.raises(ShisaError, match="no endpoint for the first model: set SHISA_FIRST_BASE_URL"):
        endpoints_from_environment("first")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert endpoints_from_environment("stronger") == [Endpoint("https://api.openai.com/v1", "OPENAI_API_KEY", "SHISA_FIRST_BASE_URL")]
    monkeypatch.setenv("SHISA_FIRST_BASE_URL", "http://a:1/v1/, http://b:2/v1")
    assert [one.shown for one in endpoints_from_environment("stronger")] == ["http://a:1", "http://b:2"]
    monkeypatch.setenv("SHISA_STRONGER_BASE_URL", "https://strong.example/v1")
    monkeypatch.setenv("SHISA_STRONGER_API_KEY", SECRET)
    [strong] = endpoints_from_environment("stronger")
    assert strong.headers() == {"Authorization": f"Bearer {SECRET}"} and SECRET not in repr(strong) and not strong.local
    for bad in ("localhost", "ftp://a/v1", "http://:8000/v1", "http://a:99999/v1"):
        monkeypatch.setenv("SHISA_FIRST_BASE_URL", bad)
        with pytest.raises(ShisaError, match="SHISA_FIRST_BASE_URL is no URL"):
            endpoints_from_environment("first")
    monkeypatch.setenv("SHISA_FIRST_BASE_URL", f"http://me:{SECRET}@a/v1")
    with pytest.raises(ShisaError, match="carries a password") as caught:
        endpoints_from_environment("first")
    assert SECRET not in str(caught.value)
    monkeypatch.setenv("SHISA_STRONGER_API_KEY", f"{SECRET}\nX: y")
    with pytest.raises(ShisaError, match="SHISA_STRONGER_API_KEY holds characters") as caught:
        strong.headers()
    assert SECRET not in str(caught.value)


# many things at once


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 8), st.integers(-1, 60))
@settings(max_examples=40)
def test_results_come_in_order_within_the_bounds_and_failures_end_it(delays, concurrency, broken):
    at_work = most = held = most_held = 0

    def items():
        nonlocal held, most_held
        for item in enumerate(delays):
            held += 1
            most_held = max(most_held, held)
            yield item

    async def work(item):
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        try:
            for _ in range(item[1]):
                await asyncio.sleep(0)
            if item[0] == broken:
                raise KeyError(broken)
            return item[0] * 2
        finally:
            at_work -= 1

    async def go():
        nonlocal held
        found = []
        async for place, result in map_bounded(work, items(), concurrency):
            held -= 1
            found.append((place, result))
        return found

    if 0 <= broken < len(delays):
        with pytest.raises(KeyError):
            run(go())
    else:
        assert run(go()) == [(place, 2 * place) for place in range(len(delays))]
    assert at_work == 0 and most <= concurrency and most_held <= 8 * concurrency


def test_a_slow_first_item_holds_a_window_not_everything_and_one_may_leave_early():
    begun = []

    async def work(item):
        begun.append(item)
        await asyncio.sleep(0.1 if item == 0 else 0)
        return item

    async def go():
        async with aclosing(map_bounded(work, iter(range(10_000)), 4)) as results:
            async for place, _ in results:
                if place == 5:
                    break
        return max(begun)

    assert run(go()) < 50


def test_items_that_fail_to_come_end_it_cleanly():
    def items():
        yield 1
        raise ShisaError("no more")

    async def go():
        return [pair async for pair in map_bounded(lambda item: asyncio.sleep(0.01, item), items(), 4)]

    with pytest.raises(ShisaError, match="no more"):
        run(go())


# the client and trouble


def test_every_trouble_is_got_over_and_answers_are_asked_for_once(store, tmp_path):
    faults = dict.fromkeys(("429", "500", "503_later", "reset_before", "reset_after", "invalid", "empty", "no_choices", "no_message", "truncated"), 0.06)
    texts = [f"text {number}" for number in range(150)]
    with fault_server(faults=faults, ledger=str(tmp_path / "ledger"), latency=0.005) as server:
        answers = ask(server.url, store, texts, concurrency=12)
        assert [answer.text for answer in answers] == list(map(reply_to, texts))
        asked = server.events()
        assert {event["kind"] for event in asked} == {*faults, "answer"} and server.stats()["most"] <= 12
        assert max(event["n"] for event in asked) <= 3  # every third try is answered
        assert [charge for charge, times in Counter(event["key"] for event in server.events("charge")).items() if times > 1] == []
        beside = AnswerStore(store.path)  # a second runner
        assert ask(server.url, beside, texts) == answers and server.stats()["requests"] == len(asked)
        beside.close()
    held = store.totals()
    unsure = sum(event["kind"] in ("reset_before", "reset_after", "invalid", "empty", "no_choices", "no_message", "truncated") for event in asked)
    assert held["answers"] == 150 and held["open"] == 0 and held["repeated"] == unsure


@pytest.mark.parametrize(("kind", "finish"), [("invalid", "endpoint_error"), ("empty", "endpoint_error"), ("no_choices", "endpoint_error"),
                                              ("400", "endpoint_error"), ("drip", "timeout")])
def test_what_is_no_answer_is_not_kept_and_asked_again_next_time(store, tmp_path, kind, finish):
    with fault_server(faults={kind: 1.0}, clean_every=99, ledger=str(tmp_path / "ledger")) as server:
        patience = {"timeout_seconds": 0.3} if kind == "drip" else {}
        begun = time.monotonic()
        [answer] = ask(server.url, store, wire_tries=2, **patience)
        if kind == "drip":  # only a first try drips: ask a second server's worth
            assert answer.finish == "stop" and 0.3 <= time.monotonic() - begun < 2
            return
        tries = 1 if kind == "400" else 2
        assert answer == Answer("", finish) and server.stats()["requests"] == tries and store.totals()["answers"] == 0
        assert store.totals()["open"] == (0 if kind == "400" else tries)  # perhaps paid, so counted
        ask(server.url, store, wire_tries=2)
        assert server.stats()["requests"] == 2 * tries and len({event["key"] for event in server.events()}) == 1


def test_an_answer_that_never_comes_is_a_timeout_after_two_tries(store):
    with fault_server(latency=30) as server:
        begun = time.monotonic()
        assert ask(server.url, store, timeout_seconds=0.15) == [Answer("", "timeout")]
        assert 0.6 <= time.monotonic() - begun < 3 and server.stats()["requests"] == 2
    assert store.totals()["answers"] == 0 and store.totals()["open"] == 2


@pytest.mark.parametrize(("status", "says", "requests"), [
    (401, "refuses the key; set OPENAI_API_KEY", 1), (403, "refuses the key", 1), (402, "no money left", 1), (404, "answers 404 for model m; check its name", 1),
    (307, "answers 307, a redirect", 1), (429, "keeps answering 429", 2), (500, "keeps answering 500", 2), (504, "keeps answering 504", 2)])
def test_an_endpoint_that_does_not_work_is_one_line_without_the_key(store, monkeypatch, status, says, requests):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with fault_server() as target, fault_server(always=status, location=f"{target.url}/chat/completions") as server:
        with pytest.raises(ShisaError, match=says) as caught:
            ask(server.url, store, wire_tries=2)
        assert server.stats()["requests"] == requests and target.stats()["requests"] == 0
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value.__context__) + repr(caught.value.__cause__)
    assert SECRET not in told and "\n" not in str(caught.value)
    assert store.totals()["open"] == (2 if status == 504 else 0)  # a proxy that gave up waiting: the work may have been done


def test_a_request_that_only_one_in_many_breaks_on_does_not_end_the_run(store):
    """A server that answers others meanwhile is not gone."""
    with fault_server(faults={"500": 0.5}, clean_every=99, latency=0.002) as server:
        answers = ask(server.url, store, range(60), wire_tries=2)
    assert {answer.finish for answer in answers} == {"stop", "endpoint_error"}


def test_no_usage_is_estimated_and_marked(store):
    with fault_server(usage=False) as server:
        [answer] = ask(server.url, store, ["a" * 400])
    assert answer.estimated and answer.prompt_tokens == 100 and answer.completion_tokens == about_tokens(answer.text) and store.totals()["estimated"] == 1


def test_same_question_at_the_same_time_is_one_request_and_one_of_two_may_leave(store):
    async def go(url):
        async with Client(store, {"m": [Endpoint(url)]}) as client:
            first, second = (asyncio.ensure_future(client.ask("m", user("sea"))) for _ in range(2))
            await asyncio.sleep(0.05)
            first.cancel()
            answer = await second
            assert first.cancelled() and answer.text == reply_to("sea")
            alone = asyncio.ensure_future(client.ask("m", user("hill")))  # cancelled by all who ask, then asked again at once
            await asyncio.sleep(0.05)
            alone.cancel()
            await asyncio.gather(alone, return_exceptions=True)
            assert (await client.ask("m", user("hill"))).text == reply_to("hill")
            left = asyncio.ensure_future(client.ask("m", user("river")))
            await asyncio.sleep(0.05)
        with pytest.raises(asyncio.CancelledError):
            await left

    with fault_server(latency=0.2) as server:
        run(go(server.url))
        assert server.stats()["requests"] == 4
    assert store.totals()["answers"] == 2 and store.totals()["open"] == 1


def test_requests_differ_by_all_that_is_asked_and_streams_are_refused(store):
    async def go(url):
        async with Client(store, {"m": [Endpoint(url)], "n": [Endpoint(url)]}) as client:
            for more in ({}, {"seed": 1}, {"temperature": 0.5}, {"max_tokens": 7}, {"top_p": 0.9}):
                await client.ask("m", user("x"), **more)
            await client.ask("n", user("x"))
            await client.ask("m", user("x"), max_tokens=client.max_tokens)
            for refused in ({"stream": True}, {"n": 2}):
                with pytest.raises(ShisaError, match="one whole answer"):
                    await client.ask("m", user("x"), **refused)
            with pytest.raises(ShisaError, match="no endpoint is named for model other"):
                await client.ask("other", user("x"))
            assert await client.ask("m", user("half a pair \ud83d")) == Answer("", "endpoint_error")

    with fault_server() as server:
        run(go(server.url))
        assert server.stats()["requests"] == 6


# several endpoints, and how fast


def test_endpoints_take_turns_and_dead_ones_are_set_aside_aloud(store, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with fault_server() as one, fault_server() as two, fault_server(key="another") as locked:
        gone, said = "http://127.0.0.1:9/v1", []
        ask([one.url, gone, two.url, locked.url], store, range(40), said=said, concurrency=4)
        counts = one.stats()["requests"], two.stats()["requests"]
        assert sum(counts) == 40 and min(counts) >= 10
        assert sorted(line.split(": ", 1)[1].split("127.0.0.1")[0] for line in said) == ["http://", "no endpoint answers at http://"]
        assert all(line.startswith("set aside: ") and SECRET not in line for line in said)
        with pytest.raises(ShisaError, match=r"no endpoint answers at http://127\.0\.0\.1:9; .*; http://127\.0\.0\.1:\d+ refuses the key"):
            ask([gone, locked.url], store, ["more"], check=True)
    with pytest.raises(ShisaError, match="no endpoint answers at http://127.0.0.1:9"):
        ask(gone, store, ["more"], check=True)
    with pytest.raises(ShisaError, match="no endpoint answers at http://127.0.0.1:9"):
        ask(gone, store, ["more"], wire_tries=2)
    assert store.totals()["open"] == 0


def test_a_model_that_an_endpoint_lacks_leaves_the_endpoint_to_the_others(store):
    async def go(good, lacking):
        said = []
        async with Client(store, {"m": [lacking, good], "n": [good], "other": [lacking]}, say=said.append) as client:
            for number in range(4):
                assert (await client.ask("m", user(number))).finish == (await client.ask("n", user(number))).finish == "stop"
            with pytest.raises(ShisaError, match="answers 404 for model other"):
                await client.ask("other", user("x"))
        return said

    with fault_server() as good, fault_server(always=404) as lacking:
        assert len(run(go(Endpoint(good.url), Endpoint(lacking.url)))) == 1 and lacking.stats()["requests"] == 2


def test_a_proxy_is_not_asked_for_this_machine(store, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with fault_server() as server:
        assert ask(server.url, store, check=True)[0].finish == "stop"


def test_a_storm_holds_back_everything_until_its_end(store, tmp_path):
    """Each form of Retry-After once: of all requests of a storm at most those that were on their way when it began are turned away."""
    with fault_server(storm_every=60, storm_seconds=0.2, latency=0.01, ledger=str(tmp_path / "ledger")) as server:
        answers = ask(server.url, store, range(300), concurrency=8, backoff_seconds=0.05)
        events, storms = server.events(), server.stats()["storms"]
    assert {answer.finish for answer in answers} == {"stop"} and storms >= 5
    turned_away = [event for event in events if event["kind"] == "storm"]
    assert len(turned_away) <= storms * 8 * 3  # the forms that say nothing readable are met with a growing wait
    assert max(event["n"] for event in events) <= 6


def test_a_rate_limit_without_a_word_is_found_and_kept(store):
    with fault_server(rate=100) as server:
        begun = time.monotonic()
        answers = ask(server.url, store, range(200), concurrency=32, backoff_seconds=0.1)
        seconds, asked = time.monotonic() - begun, server.stats()["requests"]
    assert {answer.finish for answer in answers} == {"stop"} and asked < 400 and seconds < 30


# the cap


def test_the_cap_stops_within_one_request_and_a_higher_one_goes_on(store, monkeypatch, tmp_path):
    monkeypatch.setenv("SHISA_PRICE", "m=10/100")  # on this machine it costs nothing unless it is said
    texts = [f"text {number}" for number in range(40)]

    def spent(server):  # what the server would bill
        return len(server.events("charge")) * (10 * (len("text 00") // 4 + 8) + 100 * 12) / 1e6

    faults = {"reset_after": 0.1, "500": 0.1}
    with fault_server(latency=0.01, ledger=str(tmp_path / "ledger"), faults=faults) as server:
        with pytest.raises(SpendCapReached, match=r"spend cap: 0\.0\d+ of 0\.02 USD are spent.*left over.*SHISA_CAP_USD") as caught:
            ask(server.url, store, texts, spend=Spend(cap_usd=0.02), concurrency=8, max_tokens=40)
        assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
        first, held = spent(server), store.totals()
        worst = (10 * most_prompt_tokens(user("text 00")) + 100 * 40) / 1e6
        assert first <= 0.02 < held["usd"] + held["repeated_usd"] + held["open_usd"] + worst
        answered = held["answers"]
        with pytest.raises(SpendCapReached):
            ask(server.url, store, texts, spend=Spend(cap_usd=0.02), max_tokens=40)
        assert spent(server) == first
        again = Spend(cap_usd=0.5)
        answers = ask(server.url, store, texts, spend=again, max_tokens=40)
        assert [answer.text for answer in answers] == list(map(reply_to, texts))
        charged = Counter(event["key"] for event in server.events("charge"))
        assert len(charged) == 40 and set(charged.values()) == {1}
        assert again.paid_usd == pytest.approx(store.totals()["usd"] - held["usd"]) and 0 < answered < 40
        assert again.spent(store)[0] >= spent(server) - 1e-9


def test_a_cap_on_tokens_and_one_that_never_fits(store):
    with fault_server() as server:
        with pytest.raises(SpendCapReached, match="SHISA_CAP_TOKENS"):
            ask(server.url, store, range(100), spend=Spend(cap_tokens=1_000), max_tokens=50)
        held = store.totals()
        assert 1_000 - 50 - most_prompt_tokens(user("99")) < held["prompt_tokens"] + held["completion_tokens"] <= 1_000
        asked = server.stats()["requests"]
        with pytest.raises(SpendCapReached, match="are left over and the next request may take"):
            ask(server.url, store, ["new"], spend=Spend(cap_tokens=10), max_tokens=50)
        assert server.stats()["requests"] == asked
        assert len(ask(server.url, store, [0, 1], spend=Spend(cap_tokens=10), max_tokens=50)) == 2  # out of the store: nothing is spent


def test_sendings_of_a_dead_life_count_until_they_are_answered(store):
    async def killed():
        await store.sending("of a dead life", 900, 0.0)

    run(killed())
    with fault_server() as server, pytest.raises(SpendCapReached, match="1 without an answer, counted at their worst case"):
        ask(server.url, store, spend=Spend(cap_tokens=1_000), max_tokens=50)


def test_an_unknown_price_is_refused_under_a_cap_in_dollars(store, monkeypatch):
    async def go(model):
        async with Client(store, {model: [Endpoint("https://example.invalid/v1")]}, Spend(cap_usd=1)) as client:
            return client.price(model)

    with pytest.raises(ShisaError, match='the price of some-model is unknown.*SHISA_PRICE="some-model='):
        run(go("some-model"))
    monkeypatch.setenv("SHISA_PRICE", "some-model=1/2")
    assert run(go("some-model")) == (1, 2) and run(go("gpt-4.1")) == (2, 8)


def test_the_bill_of_a_dry_run(store, monkeypatch):
    monkeypatch.setenv("SHISA_PRICE", "m=1/10")
    requests = [{"model": "m", "messages": user("a" * 4 * number), "max_tokens": 50} for number in range(1, 31)]

    async def go(url):
        async with Client(store, {"m": [Endpoint(url)]}, concurrency=4) as client:
            before = client.estimate([*requests, *requests])
            for request in requests[:25]:
                await client.ask(**request)
            return before, client.estimate(iter(requests)), client.progress

    with fault_server() as server:
        before, after, progress = run(go(server.url))
    [row] = before.rows
    assert (row["requests"], row["answered"], row["prompt_tokens"], row["completion_tokens"]) == (60, 30, 465, 465)
    assert before.usd == pytest.approx(465 * 11 / 1e6) and before.at_most_usd > before.usd
    [row] = after.rows
    assert (row["requests"], row["answered"], row["completion_tokens"]) == (30, 25, 5 * 12)
    assert "| m | 30 | 25 |" in after._repr_markdown_()
    assert progress.done == 25 and progress.spent == pytest.approx(store.totals()["usd"]) and "25 asked" in progress.line()


@given(st.integers(0, 1000), st.integers(0, 500), st.integers(0, 500))
def test_progress_speaks_in_one_line(total, stored, asked):
    progress = Progress(total)
    for number in range(stored + asked):
        progress.count(number < stored, 0.01)
    line = progress.line()
    assert "\n" not in line and f"{stored + asked:,}" in line and (progress.remaining is None or progress.remaining >= 0)


# the key


def test_the_key_is_found_nowhere(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    store, told = AnswerStore(tmp_path / "answers.sqlite"), []
    with fault_server(key=SECRET, faults={"500": 0.3, "invalid": 0.2, "429": 0.2}) as server, fault_server(key="another") as other:
        answers = ask([server.url, other.url], store, range(30), said=told, check=True)
        for url, fits in ((other.url, "refuses the key"), ("http://127.0.0.1:9/v1", "no endpoint")):
            with pytest.raises(ShisaError, match=fits) as caught:
                ask(url, store, ["more"], wire_tries=1)
            told += traceback.format_exception(caught.value, chain=True)
            error = caught.value
            while error is not None:
                told += [repr(error), str(vars(error))]
                error = error.__context__ or error.__cause__
        client = Client(store, {"m": [Endpoint(server.url)]})
        told += [repr(client), str(vars(client)), repr(answers)]
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {path.name for path in files} >= {"answers.sqlite", "answers.sqlite-wal"}
        assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    store.close()
    said = capfd.readouterr()
    assert SECRET not in "".join(told) + said.out + said.err and SECRET.encode() not in (tmp_path / "answers.sqlite").read_bytes()
    assert os.environ["OPENAI_API_KEY"] == SECRET


# SIGKILL

LIFE = """
import asyncio, json, sys
from fault_server import reply_to
from shisa.client import Client, Endpoint, map_bounded
from shisa.store import AnswerStore

async def main(path, url, items, concurrency):
    store = AnswerStore(path)
    async with Client(store, {"m": [Endpoint(url)]}, concurrency=concurrency, timeout_seconds=1, backoff_seconds=0.01, max_tokens=64) as client:
        ask = lambda number: client.ask("m", [{"role": "user", "content": f"text {number}"}])
        wrong = [n async for n, answer in map_bounded(ask, range(items), 2 * concurrency) if answer.text != reply_to(f"text {n}")]
    store.close()
    print(json.dumps(wrong))

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
"""


def stored_keys(path):
    connection = sqlite3.connect(path)
    try:
        return ({key for (key,) in connection.execute("SELECT key FROM answers")}, {key for (key,) in connection.execute("SELECT key FROM sent")})
    except sqlite3.OperationalError:  # killed before the tables were made
        return set(), set()
    finally:
        connection.close()


def lives(folder, server, items, kills, concurrency, seed):
    """Ask `items`, killed `kills` times at drawn moments, then to the end; per life: the requests that reached the server, what stood in the store."""
    store, draw, seen, found = folder / "answers.sqlite", random.Random(seed), 0, []
    command = [sys.executable, "-c", LIFE, str(store), server.url, str(items), str(concurrency)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    for life in range(kills + 1):
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if life < kills:
            wanted, deadline = draw.randint(1, 2 * items // (kills + 1)), time.monotonic() + 60
            while server.stats()["requests"] - seen < wanted and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.03))
            child.send_signal(signal.SIGKILL)
        out, err = child.communicate(timeout=120)
        assert (child.returncode, out.strip(), err) == ((-signal.SIGKILL, b"", b"") if life < kills else (0, b"[]", b"")), err.decode()[-2000:]
        time.sleep(0.2)
        events = server.events()
        found.append((events[seen:], *stored_keys(store)))
        seen = len(events)
    return found


@pytest.mark.parametrize(("honours_keys", "items", "kills"), [(True, 1_000, 10), (False, 200, 3)])
def test_killed_at_random_moments_nothing_is_lost_doubled_or_paid_twice(tmp_path, honours_keys, items, kills):
    concurrency, wire_tries = 16, 6
    faults = dict.fromkeys(("429", "500", "503_later", "reset_before", "reset_after", "invalid", "empty", "no_choices", "truncated"), 0.02) | {"drip": 0.005}
    options = {"latency": 0.02, "seed": 7, "faults": faults, "storm_every": 400, "storm_seconds": 0.1, "honours_keys": honours_keys}
    with fault_server(**options, ledger=str(tmp_path / "ledger")) as server:
        found = lives(tmp_path, server, items, kills, concurrency, seed=items)
        charges, most = Counter(event["key"] for event in server.events("charge")), server.stats()["most"]
    stored, repeated, before = set(), 0, set()
    for events, answered, open_keys in found:
        keys = Counter(event["key"] for event in events)
        assert not stored & set(keys)  # what was stored is not asked again
        assert stored <= answered and max(keys.values(), default=0) <= wire_tries
        assert len(open_keys) <= concurrency
        again = len(before & set(keys))  # reached the server before the kill, and again after it
        repeated, before = repeated + again, (before | set(keys)) - answered
        assert set(keys) - answered <= open_keys  # the next life knows all that may have been paid for
        stored = answered
    assert len(stored) == items == len(charges) and not found[-1][2]  # none lost, none doubled, nothing left open
    assert most <= concurrency and repeated <= concurrency * kills
    store = AnswerStore(tmp_path / "answers.sqlite")
    held = store.totals()
    store.close()
    twice = charges.total() - items
    print(json.dumps({"kills": kills, "requests": sum(len(events) for events, *_ in found), "asked again after a kill": repeated,
                      "paid twice": twice, "known to the store as perhaps": held["repeated"], "most in flight": most}))
    assert twice == 0 if honours_keys else twice <= held["repeated"]
