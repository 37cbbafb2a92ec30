"""A server with the OpenAI API that misbehaves on purpose, by hash and seed, and keeps a ledger of what it did.

    python fault_server.py '{"latency": 0.02, "faults": {"reset_after": 0.05}, "ledger": "ledger.jsonl", "honours_keys": true}'

Prints its port, and ends when its standard input does. Answers are a function of the last message (`reply_to`). GET /stats
tells requests, the most that were in flight at once, and charges. Settings: see `SETTINGS`.
"""

import asyncio
import hashlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

SETTINGS = {
    "latency": 0.0,  # seconds of work before an answer
    "seed": 0,
    "faults": {},  # kind: share of tries; kinds: see Connection.misbehave
    "clean_every": 3,  # of so many tries of a request the last one is answered
    "storm_every": 0,  # after so many requests everything is a 429 for storm_seconds
    "storm_seconds": 0.1,
    "rate": 0,  # requests a second; what is over it gets a 429 without Retry-After
    "ledger": "",  # file, a JSON line an event
    "honours_keys": True,  # an Idempotency-Key is charged once
    "key": "",  # the only key that is let in; others get a 401 that repeats what was sent
    "always": 0,  # every chat request gets this status
    "usage": True,
    "location": "",  # of a redirect
}
CHARGED = ("answer", "reset_after", "drip", "invalid", "empty", "no_choices", "no_message", "truncated")


def reply_to(text: str) -> str:
    """What the server answers to a message."""
    return f"答え {hashlib.sha256(text.encode()).hexdigest()[:16]}。"


class Books:
    """What the server knows of all connections."""

    def __init__(self, settings: dict):
        self.settings = {**SETTINGS, **settings}
        self.requests, self.flying, self.most, self.storms = 0, 0, 0, 0
        self.tries, self.charges = Counter(), Counter()
        self.storm_until, self.seconds = 0.0, Counter()
        self.ledger = open(self.settings["ledger"], "a", encoding="utf-8") if self.settings["ledger"] else None  # noqa: SIM115

    def write(self, what: str, key: str, **more: object) -> None:
        if self.ledger:
            self.ledger.write(json.dumps({"what": what, "key": key, "time": time.time(), **more}) + "\n")
            self.ledger.flush()

    def charge(self, key: str) -> None:
        if self.settings["honours_keys"] and self.charges[key]:
            return
        self.charges[key] += 1
        self.write("charge", key)

    def choose(self, key: str) -> str:
        """What happens to this try."""
        at, self.requests = self.requests, self.requests + 1
        settings = self.settings
        if settings["always"]:
            return str(settings["always"])
        if settings["storm_every"] and at and at % settings["storm_every"] == 0:
            self.storms, self.storm_until = self.storms + 1, time.monotonic() + settings["storm_seconds"]
        if time.monotonic() < self.storm_until:
            return "storm"
        if settings["rate"]:
            self.seconds[second := int(time.monotonic() * 10)] += 1
            if self.seconds[second] > settings["rate"] / 10:
                return "429"
        if not settings["faults"] or self.tries[key] % settings["clean_every"] == 0:
            return "answer"
        draw = random.Random(f"{settings['seed']}|{key}|{self.tries[key]}")
        kinds = [kind for kind in settings["faults"] if kind != "drip" or self.tries[key] == 1]
        weights = [settings["faults"][kind] for kind in kinds]
        return draw.choices([*kinds, "answer"], [*weights, max(1 - sum(weights), 0)])[0]


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, as little of it as the clients need."""

    def __init__(self, books: Books):
        self.books, self.buffer, self.busy, self.timer = books, b"", False, None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        if self.timer:
            self.timer.cancel()
        self.ended()

    def ended(self) -> None:
        self.books.flying -= self.busy
        self.busy = False

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        body, self.buffer = rest[:length], rest[length:]
        if first.startswith("GET /stats"):
            books = self.books
            return self.send(200, {"requests": books.requests, "most": books.most, "charges": sum(books.charges.values()), "storms": books.storms})
        if self.books.settings["key"] and headers.get("authorization") != f"Bearer {self.books.settings['key']}":
            return self.send(401, {"error": {"message": f"Incorrect API key: {headers.get('authorization')}"}})
        if first.startswith("GET "):
            return self.send(200, {"object": "list", "data": []})
        return self.ask(json.loads(body), headers.get("idempotency-key", ""), headers.get("authorization", ""))

    def ask(self, asked: dict, key: str, authorization: str) -> None:
        books, self.busy = self.books, True
        books.tries[key] += 1
        books.flying += 1
        books.most = max(books.most, books.flying)
        kind = books.choose(key)
        books.write("request", key, n=books.tries[key], kind=kind, flying=books.flying)
        wait = books.settings["latency"] if kind in CHARGED else 0.0
        text = asked["messages"][-1]["content"]
        self.timer = asyncio.get_running_loop().call_later(wait, self.misbehave, kind, key, text, authorization)

    def misbehave(self, kind: str, key: str, text: str, authorization: str) -> None:
        if kind in CHARGED:
            self.books.charge(key)
        choice = {"index": 0, "message": {"role": "assistant", "content": reply_to(text)}, "finish_reason": "stop"}
        value = {"id": "the-same-for-all", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        if self.books.settings["usage"]:
            value["usage"] = {"prompt_tokens": len(text) // 4 + 8, "completion_tokens": 12, "total_tokens": len(text) // 4 + 20}
        if kind == "answer":
            self.books.write("answer", key)
            self.send(200, value)
        elif kind in ("reset_before", "reset_after"):
            self.transport.abort()
        elif kind == "drip":
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
            self.drip()
        elif kind == "invalid":
            self.send(200, b'{"choices": [{"message": {"content": "\xff half')
        elif kind == "empty":
            self.send(200, b"")
        elif kind == "no_choices":
            self.send(200, {**value, "choices": []})
        elif kind == "no_message":
            self.send(200, {**value, "choices": [{"index": 0, "finish_reason": "stop"}]})
        elif kind == "truncated":
            body = json.dumps(value).encode()
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])
            self.transport.close()
        elif kind == "storm":
            left = max(self.books.storm_until - time.monotonic(), 0.001)
            forms = [{"retry-after-ms": f"{left * 1000:.0f}"}, {"Retry-After": f"{left:.3f}"}, {"Retry-After": formatdate(time.time() + 1, usegmt=True)},
                     {}, {"Retry-After": "soon"}]
            self.send(429, {"error": {"message": "busy"}}, forms[self.books.storms % len(forms)])
        elif kind == "503_later":
            self.send(503, b"<html>later</html>", {"Retry-After": "0.05"})
        else:
            location = {"Location": self.books.settings["location"]} if self.books.settings["location"] else {}
            self.send(int(kind), {"error": {"message": f"trouble; you sent {authorization}"}}, location)

    def drip(self) -> None:
        self.transport.write(b" ")
        self.timer = asyncio.get_running_loop().call_later(0.05, self.drip)

    def send(self, status: int, value: object, headers: dict | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()
        more = "".join(f"{name}: {text}\r\n" for name, text in (headers or {}).items())
        self.transport.write(f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.ended()


async def serve(settings: dict) -> None:
    """Serve until the standard input ends."""
    loop, books, ended = asyncio.get_running_loop(), Books(settings), asyncio.Event()
    server = await loop.create_server(lambda: Connection(books), "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop.add_reader(sys.stdin.fileno(), ended.set)
    await ended.wait()


class Running:
    """A server that was started: `url`, `stats()`, `events(kind)`."""

    def __init__(self, port: int, ledger: str):
        self.url, self.ledger = f"http://127.0.0.1:{port}/v1", ledger

    def stats(self) -> dict:
        return json.load(build_opener(ProxyHandler({})).open(self.url.replace("/v1", "/stats"), timeout=10))

    def events(self, what: str = "request") -> list[dict]:
        lines = Path(self.ledger).read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if event["what"] == what]


@contextmanager
def fault_server(**settings: object) -> Iterator[Running]:
    """Start one in a process of its own; it ends with the context, or with this process."""
    assert not set(settings) - set(SETTINGS), settings
    process = subprocess.Popen([sys.executable, "-S", __file__, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield Running(int(process.stdout.readline()), settings.get("ledger", ""))
    finally:
        process.stdin.close()
        process.wait(timeout=10)
        process.stdout.close()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
