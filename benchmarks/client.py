"""What the client costs: wall time against the ideal, CPU and memory, beside the openai package in the same run.

    python benchmarks/client.py [ITEMS] [REPEATS]

A server in a process of its own answers every request after 50 ms; 64 are in flight at once. Ideal: ITEMS / 64 × 50 ms.
Every measurement is a process of its own. Prints a line of JSON each, with the load of the machine meanwhile (`stolen`: share
of CPU time that the host took; `others`: cores that other processes used).
"""

import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LATENCY, CONCURRENCY = 0.05, 64
CONTENT = "Translate the text between the marks into Japanese, and nothing else. The kettle is on the stove; take it off when it sings. "


def messages(number: int) -> list[dict]:
    return [{"role": "system", "content": CONTENT * 4}, {"role": "user", "content": f"{CONTENT * 4} {number}"}]


async def with_shisa(url: str, items: int, folder: str) -> int:
    """Through the client and its store, in order, memory bounded."""
    from shisa.client import Client, Endpoint, map_bounded
    from shisa.store import AnswerStore

    store, good = AnswerStore(Path(folder, "answers.sqlite")), 0
    async with Client(store, {"m": [Endpoint(url)]}, concurrency=CONCURRENCY, max_tokens=256) as client:
        async for _, answer in map_bounded(lambda number: client.ask("m", messages(number)), range(items), CONCURRENCY):
            good += answer.finish == "stop"
    print(f"{store.commits} commits", file=sys.stderr)
    store.close()
    return good


async def with_openai(url: str, items: int, _: str) -> int:
    """Through the openai package alone: no store, no cap, its own retries off."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient
    from shisa.client import map_bounded

    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=DefaultAsyncHttpxClient(trust_env=False)) as api:
        def ask(number: int):
            return api.chat.completions.create(model="m", messages=messages(number), seed=0, temperature=0.0, max_tokens=256)

        return sum([reply.choices[0].finish_reason == "stop" async for _, reply in map_bounded(ask, range(items), CONCURRENCY)])


def ticks() -> list[int]:
    return [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]


def measure(which: str, items: int) -> dict:
    """One measurement, in this process."""
    from fault_server import fault_server

    work = {"shisa": with_shisa, "openai": with_openai}[which]
    with tempfile.TemporaryDirectory() as folder, fault_server(latency=LATENCY) as server:
        before, started, cpu = ticks(), time.monotonic(), time.process_time()
        good = asyncio.run(work(server.url, items, folder))
        wall, cpu = time.monotonic() - started, time.process_time() - cpu
        after, most = ticks(), server.stats()["most"]
    spent = [b - a for a, b in zip(before, after, strict=True)]
    assert good == items and most <= CONCURRENCY, (good, most)
    served = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = (sum(spent) - spent[3] - spent[4] - spent[7]) / os.sysconf("SC_CLK_TCK") - cpu - served.ru_utime - served.ru_stime
    ideal = items / CONCURRENCY * LATENCY
    return {"client": which, "items": items, "seconds": round(wall, 2), "of_ideal": round(wall / ideal, 3), "cpu_ms_a_request": round(1000 * cpu / items, 3),
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1), "stolen": round(spent[7] / sum(spent), 3),
            "others": round(max(busy, 0) / wall, 2)}


def alone(which: str, items: int) -> dict:
    """One measurement, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--one", which, str(items)], capture_output=True, text=True, check=True)
    print(done.stdout.strip(), flush=True)
    return json.loads(done.stdout)


def main(items: int, repeats: int) -> None:
    """Both clients by turns, then four times as many items for the memory."""
    runs = [(alone("shisa", items), alone("openai", max(items // 5, 1))) for _ in range(repeats)]
    more = alone("shisa", 4 * items)
    mine = min((mine for mine, _ in runs), key=lambda run: run["of_ideal"])
    print(json.dumps({
        "of_ideal_best": mine["of_ideal"], "of_ideal_all": [run["of_ideal"] for run, _ in runs],
        "cpu_of_openai": round(min(run["cpu_ms_a_request"] for run, _ in runs) / min(run["cpu_ms_a_request"] for _, run in runs), 3),
        "wall_of_openai": round(mine["of_ideal"] / min(run["of_ideal"] for _, run in runs), 3),
        "memory_of_4_times": round(more["peak_mib"] / mine["peak_mib"], 3)}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, int(sys.argv[2]) if len(sys.argv) > 2 else 3)
