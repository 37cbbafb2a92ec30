"""The planner's memory against what training steps really hold: resident memory of each process, above what it had before the model.

    python benchmarks/planner.py [--out nbs/studies/memory.json] [--only NAME]

Steps under DeepSpeed run in two processes (gloo, CPU) and need the extra `[train]`; the others run in one. Each case takes about a minute on
two cores. Memory is read from Linux (/proc/self/status, VmHWM), with glibc told to hand back at once what is freed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shisa.config import ShisaError, write_json
from shisa.cost import Job, Shape, memory

ROOT = Path(__file__).resolve().parents[1]
SHAPE = Shape(width=512, layers=6, heads=8, kv_heads=2, head_width=64, hidden=1792, rows=16_384)
SETTINGS = {"bucket": 5_000_000, "live": 1_000_000_000, "group": 1_000_000_000}
PLAIN = Job("plain", SHAPE, tokens=0, length=256, micro_batch=2, batch=2, precision="float32", attention="flash")
TWO = replace(PLAIN, gpus=2, batch=8)
CASES = {
    "no ZeRO, float32": PLAIN,
    "no ZeRO, float32, two micro-batches": replace(PLAIN, batch=4),
    "no ZeRO, autocast": replace(PLAIN, precision="autocast"),
    "no ZeRO, float32, checkpointing": replace(PLAIN, checkpointing=True, micro_batch=4, batch=4),
    "no ZeRO, float32, chunked loss": replace(PLAIN, loss="chunked", chunk=64, micro_batch=4, batch=4),
    "ZeRO-1, bf16": replace(TWO, zero=1, precision="bfloat16"),
    "ZeRO-2, float32": replace(TWO, zero=2),
    "ZeRO-3, float32": replace(TWO, zero=3),
    "ZeRO-3, bf16": replace(TWO, zero=3, precision="bfloat16"),
    "ZeRO-3, float32, checkpointing": replace(TWO, zero=3, checkpointing=True, micro_batch=4),
    "ZeRO-3, bf16, checkpointing, packed": replace(TWO, zero=3, precision="bfloat16", checkpointing=True, micro_batch=4, attention="mask"),
}
TINY = Shape(width=64, layers=2, heads=2, kv_heads=1, head_width=32, hidden=128, rows=256)


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS now, VmHWM at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def forget_peak() -> None:
    """Let VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def make(job: Job) -> tuple[Any, Any]:
    """A model of the job's shape, in its precision, and AdamW."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    shape = job.shape
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=shape.rows, hidden_size=shape.width, intermediate_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_width, sliding_window=None,
        max_position_embeddings=4096, tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa")).train()
    if job.precision == "bfloat16":
        model = model.bfloat16()
    if job.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def engine(model: Any, optimizer: Any, job: Job, settings: dict[str, int]) -> Any:
    """The model under DeepSpeed, with the settings that shisa/data/launch/zero3.json has, buckets of this size."""
    import deepspeed

    zero = {"stage": job.zero, "contiguous_gradients": True, "overlap_comm": False, "reduce_bucket_size": settings["bucket"],
            "allgather_bucket_size": settings["bucket"], "stage3_prefetch_bucket_size": settings["bucket"],
            "stage3_max_live_parameters": settings["live"], "sub_group_size": settings["group"],
            "stage3_param_persistence_threshold": 1000}
    config = {"train_micro_batch_size_per_gpu": job.micro_batch, "gradient_accumulation_steps": job.batch // (job.micro_batch * job.gpus), "gradient_clipping": 1.0,
              "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero,
              "bf16": {"enabled": job.precision == "bfloat16"}}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def loss_of(model: Any, job: Job, inputs: dict[str, Any]) -> Any:
    """The job's kind of loss, with its inputs as targets."""
    import torch

    labels = inputs["input_ids"].flatten()
    with torch.autocast("cpu", torch.bfloat16, enabled=job.precision == "autocast"):
        if job.loss == "chunked":
            from shisa.losses import chunked_cross_entropy

            hidden = model.base_model(**inputs).last_hidden_state.flatten(0, 1)
            return chunked_cross_entropy(hidden, model.get_output_embeddings().weight, labels, size=job.chunk) / len(labels)
        return torch.nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1).float(), labels)


def steps(job: Job, settings: dict[str, int], count: int) -> int:
    """Train `count` steps; the most resident bytes of the last of them."""
    import torch

    micro_batches = job.batch // (job.micro_batch * job.gpus)
    model, optimizer = make(job)
    if job.zero:
        model = engine(model, optimizer, job, settings)
    ids = torch.randint(0, job.shape.rows, (job.micro_batch, job.length))
    places = (torch.arange(job.length) % (job.length // 2 if job.attention == "mask" else job.length)).repeat(job.micro_batch, 1)
    inputs = {"input_ids": ids, "position_ids": places, "use_cache": False}
    for _ in range(count):
        forget_peak()
        for _ in range(micro_batches):
            loss = loss_of(model, job, inputs)
            (model.backward if job.zero else torch.Tensor.backward)(loss)
            del loss
            if job.zero:
                model.step()  # steps when it has seen all micro-batches
        if not job.zero:
            optimizer.step()
            optimizer.zero_grad()
    most = status("VmHWM")
    if job.zero:
        model.destroy()
    return most


def worker(path: Path) -> None:
    """One process of a measurement: a small training first, so that libraries are loaded and warm, then the one that counts."""
    import gc

    spec = json.loads(path.read_text(encoding="utf-8"))
    job, settings = Job(**{**spec["job"], "shape": Shape(**spec["job"]["shape"])}), spec["settings"]
    if job.zero:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # kernels it would compile for one machine: gloo, as between machines
        deepspeed.init_distributed("gloo")
    steps(replace(job, shape=TINY, length=32, micro_batch=1, batch=job.gpus), {**settings, "bucket": 1000}, 2)
    gc.collect()
    before = status("VmRSS")
    peak = steps(job, settings, 3)
    (path.parent / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(peak - before), encoding="utf-8")


def measure(job: Job, settings: dict[str, int]) -> list[int]:
    """Bytes above its start that each process held at most in a step. Raises `ShisaError` with the error of a process that failed."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "HF_HUB_OFFLINE": "1",
                   "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "DS_SKIP_CUDA_CHECK": "1",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "job.json"
        spec.write_text(json.dumps({"job": asdict(job), "settings": settings}), encoding="utf-8")
        many = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(job.gpus)] if job.gpus > 1 else []
        done = subprocess.run([sys.executable, *many, __file__, "--worker", str(spec)], env=environment, cwd=folder, timeout=900,
                              capture_output=True, text=True, check=False)
        if done.returncode:
            raise ShisaError(f"{job}: a process failed:\n{done.stderr[-3000:]}")
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("rank-*.json"))]


def row(name: str, job: Job, settings: dict[str, int]) -> dict[str, Any]:
    """A case's name, parameters, tokens, and MiB as measured (the fuller process) and as predicted."""
    found = measure(job, settings)
    return {"case": name, "processes": job.gpus, "million parameters": round(job.shape.parameters / 1e6, 1),
            "tokens": job.micro_batch * job.length, "measured_mib": round(max(found) / 2**20, 1),
            "predicted_mib": round(sum(memory(job, settings).values()) / 2**20, 1)}


def main() -> None:
    """Measure every case and write the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "nbs" / "studies" / "memory.json")
    parser.add_argument("--only", default="", help="a case; nothing is written")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker)
    rows = []
    for name, job in CASES.items():
        if options.only in ("", name):
            rows.append(row(name, job, SETTINGS))
            print(json.dumps(rows[-1]), flush=True)
    if not options.only:
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
        write_json(options.out, {"date": date.today().isoformat(), "device": f"2 CPU cores, {platform.machine()}", "versions": versions,
                                 "seed": 0, "settings": SETTINGS, "rows": rows})
    return None


if __name__ == "__main__":
    try:
        main()
    except ShisaError as error:
        sys.exit(f"error: {error}")
