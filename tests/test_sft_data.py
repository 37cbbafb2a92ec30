"""The fine-tuning set: the mix meets its weights, holds no benchmark item and no repetition, loses nothing, and does not depend on the order of its input."""

import asyncio
import json
import random
import threading
from collections import Counter
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shisa import sft_data
from shisa.anew import regenerate, regenerate_all
from shisa.card import card, front_matter
from shisa.client import endpoints_from_environment
from shisa.config import ShisaError, file_sha256, write_json
from shisa.evalsets import evaluation_texts
from shisa.sample import conversations, data_folder, family
from shisa.sets import open_set
from shisa.sft_data import Config, Source, clean, drawn_like, hold_out, rank, take, targets, translation_tasks
from shisa.shapes import answer_length, full_text
from shisa.stage import Artifact, Work, run_stage
from shisa.store import Answer, AnswerStore, Spend


MESSAGE = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
CHAT = {**dict.fromkeys(("id", "kind", "source", "licence", "origin"), pl.String), "messages": MESSAGE}
MODELS = [{"model": "shisa-bundled", "role": "first", "answers": 12, "prompt_tokens": 900, "completion_tokens": 700, "usd": 0.0},
          {"model": "strong", "role": "stronger", "answers": 1, "prompt_tokens": 80, "completion_tokens": 60, "usd": 1.5}]


def artifact(folder: Path, name: str, tables: dict[str, pl.DataFrame], metrics: dict) -> Artifact:
    """A small artifact, written by hand."""
    (folder / name).mkdir(parents=True)
    for table, frame in tables.items():
        frame.write_parquet(folder / name / table)
    files = {table: {"bytes": (folder / name / table).stat().st_size, "sha256": file_sha256(folder / name / table)} for table in tables}
    write_json(folder / name / "manifest.json", {"stage": name, "files": files, "metrics": metrics, "counts": {}, "licences": [], "fingerprint": name})
    return Artifact(folder / name)


def chat(id: str, question: str, answer: str, **more: object) -> dict:
    """One row of an artifact of conversations."""
    return {"id": id, "kind": "talk", "source": "sample", "licence": "Apache-2.0", "origin": "translated",
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def inputs(folder: Path, seed: int | None = None, extra: tuple[dict, ...] = (), metrics: dict | None = None) -> dict[str, Artifact]:
    """Artifacts of 41 and 42 out of the bundled conversations, their rows shuffled by a seed."""
    chats = [{**{key: row[key] for key in ("id", "kind")}, "source": "sample", "licence": "Apache-2.0", "origin": "translated", "messages": row["messages_ja"],
              "original": row["messages_en"]} for row in conversations()]
    turns = [{"id": row["id"], "turn": turn, "role": english["role"], "source": english["content"], "translation": japanese["content"], "status": "translated", "reason": "",
              "attempts": 1, "model": "shisa-bundled"} for row in conversations() for turn, (english, japanese) in enumerate(zip(row["messages_en"], row["messages_ja"], strict=True))]
    chats += [{**row, "original": row["messages"]} for row in extra]
    made = [chat(f"gen-{n}", f"{thing}の選び方を{n + 2}つ教えてください。", f"一つ目は{thing}の大きさ、二つ目は値段を見ることです。迷ったときは店の人に{thing}のことを聞きましょう。", source="generated", origin="generated")
            for n, thing in enumerate(("傘", "机", "鍋", "靴", "地図", "椅子"))]
    if seed is not None:
        for rows in (chats, turns, made):
            random.Random(seed).shuffle(rows)
    models = {"models": MODELS} if metrics is None else metrics
    return {"41_translate": artifact(folder, "41_translate", {"conversations.parquet": pl.DataFrame(chats, schema={**CHAT, "original": MESSAGE}), "translations.parquet": pl.DataFrame(turns)}, models),
            "42_generate": artifact(folder, "42_generate", {"conversations.parquet": pl.DataFrame(made, schema=CHAT)}, {"models": []} if metrics is None else metrics)}


def built(folder: Path, config: Config = Config(), **options: object) -> tuple[dict, Work, Path]:
    """The stage run on hand-made inputs: metrics, work, folder of the result."""
    work = Work(folder / "out", folder / "scratch", folder / ".work" / "status.json", "43_sft_data")
    work.status.parent.mkdir(parents=True)
    work.path.mkdir(parents=True)
    work.scratch.mkdir()
    metrics = sft_data.run(config, inputs(folder, **options), work)
    work.finish_rejects()
    return metrics, work, work.path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return built(tmp_path_factory.mktemp("tiny"))


def test_the_tiny_set_uses_every_kind_of_source(tiny):
    metrics, work, folder = tiny
    train, heldout = (pl.read_parquet(folder / f"{name}.parquet") for name in ("train", "heldout"))
    assert train.schema == heldout.schema == pl.Schema(sft_data.SCHEMA) and metrics["rows"] == {"train": train.height, "heldout": heldout.height}
    assert set(train["origin"]) == {"translated", "original", "task", "generated", "template"} and set(train["lang"]) == {"ja", "en"}
    assert not set(train["id"]) & set(heldout["id"]) and train["id"].n_unique() == train.height
    assert (train["source"] == "family").sum() == 300 and heldout.filter(pl.col("source") != "family").height > 0
    assert work.counts["in"] == work.counts["kept"] + sum(work.counts["dropped"].values())
    again, dropped = clean(train.to_dicts(), evaluation_texts(None))
    assert dropped == [] and len(again) == train.height


def test_a_conversation_its_original_and_its_tasks_stay_on_one_side(tiny):
    def parents(frame):
        return {id.removeprefix("task/").partition("#")[0].removesuffix("/en") for id, origin in frame.select("id", "origin").iter_rows() if origin in ("translated", "original", "task")}

    train, heldout = (pl.read_parquet(tiny[2] / f"{name}.parquet") for name in ("train", "heldout"))
    assert parents(heldout) and not parents(train) & parents(heldout)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_rows_in_another_order_give_the_same_bytes(tiny, tmp_path, seed):
    metrics, _, folder = built(tmp_path, seed=seed)
    for name in ("train.parquet", "heldout.parquet", "README.md", "rejects.parquet"):
        assert (folder / name).read_bytes() == (tiny[2] / name).read_bytes(), name
    assert metrics == tiny[0]


def test_short_items_of_a_benchmark_are_found_as_lines():
    against = [{"id": "niilc/1", "text": "雪国の作者は？"}, {"id": "x/2", "text": "犬は？"}]
    rows = [chat("a", "答えてください。\n雪国の作者は。", "川端康成です。"), chat("b", "雪国の作者はどんな人でしたか。", "静かな人でした。"), chat("c", "犬は？", "動物です。")]
    kept, dropped = clean(rows, against)
    assert [row["id"] for row in kept] == ["b", "c"] and [(row["id"], reason, where) for row, reason, where in dropped] == [("a", "contaminated", "niilc/1")]


def test_planted_items_and_duplicates_go_and_are_told_of(tmp_path):
    item = next(row["text"] for row in evaluation_texts(None) if len(row["text"]) > 60)
    known = conversations()[0]["messages_ja"]
    long = "".join(f"{n}番目の棚には{thing}を置きます。" for n, thing in enumerate(("皿", "本", "傘", "鍋", "靴", "箱", "紙", "糸", "筆", "時計", "帽子", "地図")))
    planted = (chat("bench", f"解いてください。{item}", "はい。"), {**chat("copy", "", ""), "messages": known},
               chat("a-long", "棚の使い方を書いてください。", long), chat("z-near", "棚の使い方を書いてください。", long.replace("傘", "杖")))
    metrics, work, folder = built(tmp_path, Config(sources=Config().sources[:1] + Config().sources[3:]), extra=planted)
    rejects = pl.read_parquet(folder / "rejects.parquet")
    reasons = dict(rejects.filter(pl.col("reason").is_in(["contaminated", "duplicate", "near duplicate"])).select("id", "reason").iter_rows())
    assert reasons.pop("bench") == "contaminated" and len({"copy", "conv-001"} & reasons.keys()) == 1 and len({"a-long", "z-near"} & reasons.keys()) == 1
    text = "\n".join(full_text(row) for name in ("train", "heldout") for row in pl.read_parquet(folder / f"{name}.parquet").iter_rows(named=True))
    assert item not in text and work.counts["in"] == work.counts["kept"] + sum(work.counts["dropped"].values()) and metrics["dropped"]["contaminated"] == 1


ROWS = st.lists(st.tuples(st.integers(1, 400), st.integers(0, 50)), min_size=1, max_size=40)


def made(name: str, sizes: list[tuple[int, int]]) -> list[dict]:
    """Rows with answers of these lengths."""
    return [{"id": f"{name}-{n}", "messages": [{"role": "user", "content": "q" * asked}, {"role": "assistant", "content": "a" * size}]} for n, (size, asked) in enumerate(sizes)]


@given(ROWS, ROWS, ROWS, st.tuples(*[st.floats(0.05, 1)] * 3), st.integers(1, 4), st.integers(0, 3000), st.randoms())
@settings(max_examples=80, deadline=None)
def test_the_mix_keeps_its_weights(one, two, three, weights, passes, most, draw):
    rows = {name: made(name, sizes) for name, sizes in zip("abc", (one, two, three), strict=True)}
    sizes = {name: sum(map(answer_length, own)) for name, own in rows.items()}
    wanted = targets(sizes, dict(zip("abc", weights, strict=True)), passes, most)
    for name, own in rows.items():
        taken = take(own, wanted[name], 0)
        longest, got = max(map(answer_length, own)), sum(map(answer_length, taken))
        assert abs(got - wanted[name]) <= longest / 2 + 0.5 and got <= passes * sizes[name] + longest
        assert wanted[name] == pytest.approx(sum(wanted.values()) * weights["abc".index(name)] / sum(weights), abs=3)
        assert taken == take(draw.sample(own, len(own)), wanted[name], 0) and len({row["id"] for row in taken}) == len(taken)
        assert max(Counter(row["id"].partition("#")[0] for row in taken).values(), default=0) <= passes + 1
    assert not most or sum(wanted.values()) <= most + 3


def test_a_source_without_rows_cannot_have_a_weight():
    with pytest.raises(ShisaError, match="source b has no rows"):
        targets({"a": 5, "b": 0}, {"a": 0.5, "b": 0.5}, 1)
    assert targets({"a": 5}, {}, 1) == {}


@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 10_000), st.floats(0.05, 1)), min_size=1), st.integers(1, 3), st.integers(1, 20_000))
def test_a_scarce_source_gives_what_it_can_and_the_others_keep_their_part(sources, passes, aimed):
    sizes, weights = ({name: pair[place] for name, pair in sources.items()} for place in (0, 1))
    wanted = targets(sizes, weights, passes, aimed, short=True)
    for name, size in wanted.items():
        assert size == pytest.approx(min(passes * sizes[name], aimed * weights[name] / sum(weights.values())), abs=1)


def test_the_shares_that_were_asked_are_given(tmp_path):
    sources = (Source(name="translated", place="41_translate", weight=0.6), Source(name="english", place="originals", weight=0.3), Source(name="tasks", place="tasks", weight=0.1),
               Source(name="generated", place="42_generate"))
    metrics, work, folder = built(tmp_path, Config(sources=sources, passes=3))
    assert all(each["given"] == pytest.approx(each["asked"], abs=0.02) for each in metrics["shares"].values()) and metrics["repeated"] > 0
    ids = pl.read_parquet(folder / "train.parquet")["id"]
    assert ids.n_unique() == len(ids) and sum("#2" in id or "#3" in id for id in ids if not id.startswith("task/")) > 0
    assert work.counts["kept"] + metrics["repeated"] == sum(metrics["rows"].values())


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=5), st.text("xyz", min_size=1, max_size=2), min_size=1, max_size=40), st.floats(0, 0.5), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_no_group_is_divided_and_a_growing_set_moves_no_group(groups, share, seed):
    rows = [{"id": id, "group": group} for id, group in groups.items()]
    train, held = hold_out(rows, share, seed)
    assert len(train) + len(held) == len(rows) and not {row["group"] for row in train} & {row["group"] for row in held} and bool(held) == (share > 0)
    more = hold_out([*rows, {"id": "new", "group": "new"}], share, seed)[1]
    if sum(rank(f"{row['group']}|held out", seed) < share for row in held) == len(held):
        assert [row for row in more if row["id"] != "new"] == held


@given(st.integers(0, 50), st.integers(72, 460))
@settings(max_examples=15, deadline=None)
def test_family_shows_every_word_and_form_in_training(seed, cap):
    train, heldout, left_out = sft_data.family_rows(seed, 0.2, cap)
    spec = family()
    total = sum(map(len, spec["categories"].values())) * len(spec["templates"])
    assert len(train) + len(heldout) + left_out == total and 0.15 * total < len(heldout) < 0.25 * total
    assert not {row["id"] for row in train} & {row["id"] for row in heldout}
    assert {row["id"].split("/")[1] for row in heldout} <= {row["id"].split("/")[1] for row in train}
    assert {row["id"].split("/")[2] for row in train} == {str(number) for number in range(len(spec["templates"]))}


def test_tasks_are_made_of_accepted_turns_alone():
    chats = {"c": chat("c", "質問", "答え", source="slimorca", licence="MIT")}
    turns = [{"id": "c", "turn": n, "source": source, "translation": translation, "status": status} for n, (source, translation, status) in enumerate((
        ("A {text} and a question?", "{text}と質問？", "translated"), ("An answer.", "", "skipped"), ("Long. " * 50, "長い。" * 50, "translated"),
        ("https://example.com", "https://example.com", "translated"), ("Half.", "半", "failed"), ("A reply.", "訳さずに書いた返事", "backfilled")))] + [{"id": "gone", "turn": 0, "source": "Lost.", "translation": "失われた。", "status": "translated"}]
    tasks, dropped = translation_tasks(turns, chats, 100, 0)
    assert len(tasks) == 1 and dropped == {"turn without an accepted translation": 5, "turn too long for a task": 1}
    row = tasks[0]
    assert (row["source"], row["licence"], row["parent"], row["origin"]) == ("slimorca", "MIT", "c", "task")
    asked, answer = (message["content"] for message in row["messages"])
    assert {answer} < {turns[0]["source"], turns[0]["translation"]} and (turns[0]["source"] if answer == turns[0]["translation"] else turns[0]["translation"]) in asked
    many = translation_tasks([{**turns[0], "turn": n} for n in range(400)], chats, 100, 0)[0]
    assert 0.4 < sum(row["lang"] == "ja" for row in many) / 400 < 0.6 and all(sum(option.count("{text}") == 1 for option in options) == 5 for options in sft_data.task_wordings().values())
    assert len({row["messages"][0]["content"] for row in many}) == 10
    two = translation_tasks([{**turns[0], "part": part} for part in range(2)], chats, 100, 0)[0]
    assert [row["id"] for row in two] == ["task/c#0", "task/c#0.1"]


def test_dsir_draws_what_looks_like_the_target_and_the_same_in_any_order():
    rows = [{"id": f"r{n}", "messages": [{"role": "user", "content": text}]} for n, text in enumerate(
        [f"Compute the derivative of x^{n} + {n}x." for n in range(60)] + [f"My cat has slept on the sofa for {n} hours, is that normal?" for n in range(20)])]
    target = ["Why does my cat sleep so much?", "Is it normal that a cat hides under the sofa?"]
    drawn = drawn_like(rows, target, 0.25, 3)
    assert sum(drawn) == 20 and sum(drawn[60:]) >= 14
    order = random.Random(0).sample(range(80), 80)
    assert drawn_like([rows[place] for place in order], target, 0.25, 3) == [drawn[place] for place in order]
    assert drawn_like(rows, target, 0.25, 4) != drawn


def test_published_sets_are_mixed_in_by_score_and_draw(tmp_path):
    def answer(score, text):
        return {"model": "m", "response": text, "overall_score": score, "fine-grained_score": 4.5}

    words = ("river", "market", "engine", "garden", "harbour", "winter")
    feedback = [{"source": "flan", "instruction": f"Tell me about the {word} near the old town.", "completions": [answer(score, f"The {word} is worth a visit early in the day."), answer(2, "No.")]}
                for word, score in zip(words, (9.5, 8.5, 9, 7, 10, "N/A"), strict=True)]
    (tmp_path / "uf.jsonl").write_text("".join(json.dumps(row) + "\n" for row in feedback), encoding="utf-8")
    orca = [{"conversations": [{"from": "human", "value": f"Solve {n} + {n * 7} = ?", "weight": 0.0}, {"from": "gpt", "value": f"The sum of {n} and {n * 7} is {n * 8}.", "weight": 1.0}]} for n in range(40)]
    (tmp_path / "orca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in orca), encoding="utf-8")
    sources = (*Config().sources, Source(name="uf", place=str(tmp_path / "uf.jsonl"), form="ultrafeedback", licence="MIT", select="score"),
               Source(name="orca", place=str(tmp_path / "orca.jsonl"), form="slimorca", licence="MIT", select="dsir", share=0.25))
    metrics, work, folder = built(tmp_path / "run", Config(sources=sources, heldout_share=0, near=1.0))
    rows = pl.read_parquet(folder / "train.parquet")
    assert (rows["source"] == "uf").sum() == 3 and metrics["dropped"]["score below 9"] == 3  # the unscored answer is never best
    assert (rows["source"] == "orca").sum() == 10 and metrics["dropped"]["not drawn"] == 30 and set(rows.filter(source="orca")["licence"]) == {"MIT"}
    assert {"source": "uf", "licence": "MIT", "records": 3} in work.licences
    marks = sft_data.external(Config(sources=sources))
    assert {"uf/uf.jsonl", "orca/orca.jsonl"} <= marks.keys()


def test_mistakes_in_a_mix_are_one_line(tmp_path):
    for sources, says in (((Source(name="a", place="41_translate"), Source(name="a", place="originals")), "two sources have the same name"),
                          ((Source(name="a", place="41_translate"), Source(name="b", place="originals", select="dsir")), "target english has no rows")):
        with pytest.raises(ShisaError, match=says):
            built(tmp_path / says[:5], Config(sources=sources))


def test_rows_of_41_that_no_source_takes_are_counted(tmp_path):
    metrics, work, _ = built(tmp_path, Config(sources=(Source(name="other", place="41_translate", only="other"), Source(name="family", place="family", cap=9))), extra=(chat("o", "色は？", "赤です。", source="other"),))
    assert metrics["dropped"]["of no source in the mix"] == len(conversations())


def test_the_card_is_read_by_the_hub_and_tells_what_a_person_must_know(tiny):
    text = (tiny[2] / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["language"] == ["ja", "en"] and front["license"] == "apache-2.0" and front["task_categories"] == ["text-generation"] and front["size_categories"] == ["n<1K"]
    assert front["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "train.parquet"}, {"split": "heldout", "path": "heldout.parquet"}]}]
    assert {"sft", "japanese", "translated", "synthetic"} <= {*front["tags"]}
    for said in ("| strong | stronger | 1 | 80 | 60 | 1.50 |", "Together 1.50 USD", "it runs no model", "## What was left out", "- over the cap: ", "## Limits", "| english | 0.060 |"):
        assert said in body, said
    assert all(f"- {reason}: {count}" in body for reason, count in tiny[0]["dropped"].items())


def test_the_artifact_loads_as_a_data_set_of_the_hub(tiny, tmp_path):
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(str(tiny[2]), cache_dir=str(tmp_path))
    assert {name: part.num_rows for name, part in found.items()} == tiny[0]["rows"]
    assert {*found["train"].column_names} == {*sft_data.SCHEMA} and found["train"][0]["messages"][-1]["role"] == "assistant"


def test_the_card_of_a_mix_of_licences(tiny, tmp_path):
    frame = pl.read_parquet(tiny[2] / "train.parquet")
    mixed = frame.with_columns(licence=pl.when(pl.col("origin") == "task").then(pl.lit("CC BY-SA 3.0")).otherwise("licence"))
    front = front_matter(mixed)
    assert front["license"] == "other" and front["license_name"] and "share-alike: CC BY-SA 3.0" in card(mixed, mixed[:0], {**tiny[0], "models": []})
    metrics, _, folder = built(tmp_path, metrics={})  # chapters before that recorded no models
    assert metrics["models"] == [] and "recorded no use of a model" in (folder / "README.md").read_text(encoding="utf-8")


def test_answers_are_written_anew_turn_by_turn_and_refusals_cut_the_conversation():
    talk = [{"role": "system", "content": "短く。"}, {"role": "user", "content": "色は？"}, {"role": "assistant", "content": "古い答え一。"}, {"role": "user", "content": "形は？"}, {"role": "assistant", "content": "古い答え二。"}]
    row, seen = {"id": "r", "source": "oasst", "licence": "Apache-2.0", "lang": "ja", "kind": "conversation", "messages": talk}, []

    def writes(*answers):
        left = list(answers)

        async def ask(messages, attempt):
            seen.append([dict(message) for message in messages])
            return left.pop(0)

        return ask

    anew, refused = asyncio.run(regenerate(row, writes(Answer("赤です。"), Answer(" 丸です。"))))
    assert [m["content"] for m in anew["messages"]] == ["短く。", "色は？", "赤です。", "形は？", "丸です。"] and anew["origin"] == "regenerated" and refused == [] and row["messages"] is talk
    assert "古い" not in json.dumps(seen, ensure_ascii=False) and seen[1][2]["content"] == "赤です。"
    anew, refused = asyncio.run(regenerate(row, writes(Answer("赤です。"), Answer("途中", "length"))))
    assert len(anew["messages"]) == 3 and refused == ["length"]
    assert asyncio.run(regenerate(row, writes(Answer("")))) == (None, ["empty"])
    assert asyncio.run(regenerate(row, writes(Answer("It is red.")), lambda prompt, reply, lang: ["wrong_language"] if lang == "ja" else [])) == (None, ["wrong_language"])


@pytest.fixture
def strong(monkeypatch):
    """An endpoint of the stronger role on this machine: (its base URL, the questions that it was asked)."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, body):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body, ensure_ascii=False).encode())

        def do_GET(self):
            self.answer({"object": "list", "data": [{"id": "strong", "object": "model"}]})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((request["messages"][-1]["content"], request["temperature"], request["top_p"]))
            text = "" if "沈黙" in asked[-1][0] else f"「{asked[-1][0]}」へのお答えです。よく考えてから決めてください。"
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            self.answer({"id": "x", "object": "chat.completion", "created": 0, "model": "strong", "choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("SHISA_STRONGER_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("SHISA_STRONGER_API_KEY", "none")
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    server.server_close()


def test_a_set_whose_answers_are_written_anew_is_paid_for_once(strong, tmp_path, monkeypatch):
    rows = [{"instruction": question, "input": "", "output": "古い答えです。", "category": "open_qa", "index": str(n)} for n, question in
            enumerate(("海の色はなぜ青いのですか。", "鳥はどうして飛べるのですか。", "沈黙について教えてください。"))]
    (tmp_path / "dolly.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(sft_data, "check_reply", lambda prompt, reply, lang: [] if reply else ["empty"])
    sources = (*Config().sources[:1], Source(name="dolly-ja", place=str(tmp_path / "dolly.jsonl"), form="dolly", licence="CC BY-SA 3.0", answers="regenerate"))
    metrics, work, folder = built(tmp_path / "run", Config(sources=sources, model="strong", heldout_share=0))
    new = pl.read_parquet(folder / "train.parquet").filter(source="dolly-ja")
    assert set(new["origin"]) == {"regenerated"} and new.height == 2 and set(new["licence"]) == {"CC BY-SA 3.0"} and "古い" not in json.dumps(new["messages"].to_list(), ensure_ascii=False)
    assert metrics["dropped"]["answer refused: empty"] == 1 and {(temperature, top) for _, temperature, top in strong[1]} == {(1.0, 0.95)}
    assert metrics["models"][-1] == {"model": "strong", "role": "writes answers anew", "answers": 4, "prompt_tokens": 28, "completion_tokens": 20, "usd": metrics["models"][-1]["usd"]}
    assert len(strong[1]) == 4  # two attempts at the silent one
    with closing(AnswerStore.of(work)) as store:
        found, _ = regenerate_all([row for row in open_set(str(tmp_path / "dolly.jsonl"), "dolly", licence="MIT")], "strong", endpoints_from_environment("stronger"), store, Spend(),
                                  sft_data.check_reply, top_p=0.95)
    assert len(strong[1]) == 4 and sum(row is not None for row, _ in found) == 2  # all of it from the store


def test_the_stage_runs_offline_and_is_found_again(tmp_path):
    inputs(tmp_path)
    first = run_stage("43_sft_data", "tiny", tmp_path)
    assert first.counts["kept"] == sum(first.metrics["rows"].values()) and run_stage("43_sft_data", "tiny", tmp_path).manifest == first.manifest
    assert sft_data.plot(first).axes[0].get_title() == "rows by origin"


@pytest.mark.shared
def test_real_sets_go_through_the_mix(tmp_path):
    folder = data_folder()
    sources = (*Config().sources[:4], Source(name="dolly-ja", place=str(folder / "parallel" / "dolly_ja"), form="dolly", weight=0.4, cap=800),
               Source(name="hh", place=str(folder / "pref" / "hh_rlhf" / "harmless-base"), weight=0.1, select="dsir", share=0.2), Source(name="family", place="family", cap=300))
    metrics, work, path = built(tmp_path, Config(sources=sources, evaluation="all"))
    assert metrics["evaluation_texts"] > 30_000 and work.counts["in"] == work.counts["kept"] + sum(work.counts["dropped"].values())
    assert all(each["given"] == pytest.approx(each["asked"], abs=0.03) for each in metrics["shares"].values())
    assert {"CC BY-SA 3.0", "MIT"} <= set(pl.read_parquet(path / "train.parquet")["licence"]) and yaml.safe_load((path / "README.md").read_text().split("---\n")[1])["license"] == "other"
