"""How much of a GPU the training step uses, on a slice of the 7B shape; and what the losses hold and take.

On one GPU, from the root of the repository (H100: two depths that fit, about five minutes):

    python benchmarks/training.py mfu --layers 4 8 --json benchmarks/training/results/mfu-h100.json
    python benchmarks/training.py mfu --layers 2 4 --micro-batch 1 --batch 4 --json benchmarks/training/results/mfu-a100-40.json

`mfu` trains Mistral 7B's shape (hidden 4096, 32 heads, 8 of keys and values, intermediate 14336) with 120,128 rows on sequences of 4,096
tokens, with two numbers of layers, through `shisa.train.train_lm`, as chapter 31 does, and beside it through a plain Hugging Face
Trainer on the same tokens. A step's time is a·layers + b; from the two depths follow a (a layer) and b (embeddings, output layer, loss,
optimiser of both), and from these the time of 32 layers. That is an extrapolation: 32 layers do not fit one GPU with their optimiser states,
and what sharding them over GPUs costs is not in it. `--toy` runs all of it on a CPU with a model of a few thousand parameters.

`loss` measures peak memory and time of the losses on the CPU or a GPU, each in a process of its own:

    python benchmarks/training.py loss --rows 120128 --width 64 --tokens 1024 --json benchmarks/training/results/loss-cpu.json

FLOPs are counted by `shisa.cost.training_flops` (PaLM's formula, attention not halved for causality; recomputed activations do not count)
and by torch.utils.flop_counter on the meta device; the two must agree within 3%.
"""
import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s of the SXM boards (data sheets)
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 120_128}
TOY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
FULL_LAYERS, TOKENS = 32, 8e9  # of Mistral 7B; of Shisa's pre-training
WARM = 3  # steps before the clock counts


def new_model(shape: dict[str, int], layers: int, length: int, device: str, attention: str = "sdpa") -> Any:
    """A randomly initialised Mistral of this shape, float32, made on the device."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return MistralForCausalLM(MistralConfig(
            **shape, num_hidden_layers=layers, max_position_embeddings=length, sliding_window=None, attn_implementation=attention))


def sequences(count: int, length: int, rows: int) -> Any:
    """Packed sequences of random ids, four documents in each, no padding."""
    from shisa.packing import cut, pack

    random = np.random.default_rng(0)
    return pack(cut([random.integers(3, rows, length // 4).astype(np.int32) for _ in range(4 * count)], length), length, pad_id=0)


def flops_per_token(shape: dict[str, int], layers: int, length: int) -> int:
    """Forward and backward of one token, by formula."""
    from shisa.cost import shape_of

    return shape_of({**shape, "num_hidden_layers": layers}).training_flops(length)


def counted_flops(shape: dict[str, int], layers: int, length: int) -> float:
    """The same by torch's counter, on the meta device: nothing is computed. Attention is written out (eager) to be counted whole."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = new_model(shape, layers, length, "meta", "eager")
    ids = torch.zeros((1, length), dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        mask = torch.zeros((1, 1, length, length), device="meta")  # given, so that none is worked out from positions
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
    return counter.get_total_flops() / length


def peak_of(device: str) -> tuple[float, str]:
    """Peak FLOP/s of the device and its name; on a CPU what a large float32 product reaches here, best of five."""
    import torch

    if device == "cuda":
        name = torch.cuda.get_device_name()
        known = [peak for part, peak in PEAKS.items() if part in name]
        if not known:
            sys.exit(f"{name}: its peak is not known here; give it with --peak")
        return known[0], name
    size, best = 1024, float("inf")
    matrix = torch.randn(size, size)
    for _ in range(5):
        began = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best, f"{torch.get_num_threads()} CPU threads (peak measured)"


def peak_memory(device: str) -> float:
    """Peak bytes: of the GPU's allocator since it was last reset, or of this process so far."""
    import torch

    return float(torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def start_clean(device: str) -> None:
    """Free what earlier runs held, and count memory anew (on a GPU)."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def ours(args: argparse.Namespace, layers: int, packed: Any, device: str) -> list[float]:
    """Seconds of each counted step through `train_lm`; its own log has them."""
    from shisa.train import Follow, TrainSettings, train_lm

    settings = TrainSettings(
        steps=WARM + args.steps, batch=args.batch, micro_batch=args.micro_batch, learning_rate=1e-5, checkpoint_every=10**9,
        dtype="float32" if args.toy else "bfloat16", loss=args.loss, attention=args.attention,
        gradient_checkpointing=args.gradient_checkpointing)
    with tempfile.TemporaryDirectory() as folder:
        train_lm(new_model(args.shape, layers, args.length, device), packed, settings, Path(folder, "checkpoints"),
                 follow=Follow(Path(folder, "log.jsonl")))
        lines = [json.loads(line) for line in Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["seconds"] for line in lines if "loss" in line][WARM:]


def plain_trainer(args: argparse.Namespace, layers: int, packed: Any, device: str) -> list[float]:
    """Seconds of each counted step through a plain Hugging Face Trainer: its own loss over all logits, documents not kept apart."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    rows = [{"input_ids": ids, "labels": ids} for ids in packed.batch(np.arange(len(packed)))["input_ids"]]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        plan = TrainingArguments(
            folder, max_steps=WARM + args.steps, per_device_train_batch_size=args.micro_batch, learning_rate=1e-5,
            gradient_accumulation_steps=args.batch // args.micro_batch, bf16=not args.toy, use_cpu=device == "cpu", optim="adamw_torch_fused",
            gradient_checkpointing=args.gradient_checkpointing, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
        Trainer(new_model(args.shape, layers, args.length, device), plan, train_dataset=rows, callbacks=[clock]).train()
    return np.diff(clock.ends)[WARM - 1:].tolist()


def measure(args: argparse.Namespace, layers: int, packed: Any, device: str, peak: float) -> list[dict[str, Any]]:
    """Both ways at one depth: median step, tokens a second, peak memory, model FLOPs utilisation; a way that does not fit says so."""
    import torch

    each, found = flops_per_token(args.shape, layers, args.length), []
    for name, way in (("shisa", ours), ("plain Trainer", plain_trainer)):
        start_clean(device)
        row: dict[str, Any] = {"way": name, "layers": layers, "flops_per_token": each}
        try:
            seconds = way(args, layers, packed, device)
        except torch.cuda.OutOfMemoryError:
            found.append({**row, "error": "out of memory"})
            continue
        speed = args.batch * args.length / statistics.median(seconds)
        found.append({**row, "seconds": seconds, "median": statistics.median(seconds), "tokens_per_second": speed,
                      "peak_bytes": peak_memory(device), "mfu": speed * each / peak})
        print(f"{name}, {layers} layers: {speed:,.0f} tokens/s, {speed * each / peak:.1%} of the peak", flush=True)
    return found


def extrapolate(rows: list[dict[str, Any]], args: argparse.Namespace, peak: float) -> dict[str, Any] | None:
    """From two depths to all layers, with the arithmetic as text; None where one of them was not measured."""
    if any("error" in row for row in rows):
        return None
    (few, first), (many, second) = sorted((row["layers"], row["median"]) for row in rows)
    layer = (second - first) / (many - few)
    rest, step = first - few * layer, first + (args.full_layers - few) * layer
    speed = args.batch * args.length / step
    mfu = speed * flops_per_token(args.shape, args.full_layers, args.length) / peak
    text = (f"a layer: ({second:.4f} - {first:.4f}) s / ({many} - {few}) = {layer:.4f} s; the rest: {first:.4f} - {few} x {layer:.4f} = {rest:.4f} s; "
            f"{args.full_layers} layers: {rest:.4f} + {args.full_layers} x {layer:.4f} = {step:.4f} s a step of {args.batch * args.length} tokens")
    return {"layers": args.full_layers, "layer_seconds": layer, "rest_seconds": rest, "step_seconds": step, "tokens_per_second": speed,
            "mfu": mfu, "gpu_hours_for_8B_tokens": TOKENS / speed / 3600, "arithmetic": text}


def mfu(args: argparse.Namespace) -> dict[str, Any]:
    """The whole measurement as plain JSON."""
    import torch

    from shisa.models import quiet

    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.toy:
        sys.exit("no GPU here: a slice of the 7B shape would take hours; --toy runs the script on a small shape")
    known, name = peak_of(device) if not args.peak else (args.peak, torch.cuda.get_device_name() if device == "cuda" else "CPU")
    formula, counted = (count(args.shape, args.layers[0], args.length) for count in (flops_per_token, counted_flops))
    if abs(formula / counted - 1) > 0.03:
        sys.exit(f"FLOPs a token: {formula:.4e} by formula, {counted:.4e} counted: more than 3% apart")
    packed = sequences(args.batch * 2, args.length, args.shape["vocab_size"])
    rows = [row for layers in args.layers for row in measure(args, layers, packed, device, known)]
    ways = {way: extrapolate([row for row in rows if row["way"] == way], args, known) for way in ("shisa", "plain Trainer")}
    return {"device": name, "peak_flops": known, "flops_per_token": {"formula": formula, "counted": counted, "layers": args.layers[0]},
            "settings": {key: getattr(args, key) for key in (
                "shape", "length", "batch", "micro_batch", "steps", "loss", "attention", "gradient_checkpointing", "toy")},
            "measured": rows, "extrapolated": ways}


def one_loss(args: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward of one loss in this process: peak bytes above what the inputs hold, median seconds, the loss itself."""
    import torch

    from shisa.losses import chunked_cross_entropy, liger_cross_entropy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden, weight = torch.randn(args.tokens, args.width, device=device), torch.randn(args.rows, args.width, device=device)
    labels = torch.randint(0, args.rows, (args.tokens,), device=device)
    hidden, weight = hidden.mul_(0.1).requires_grad_(), weight.requires_grad_()

    def native(hidden: Any, weight: Any, labels: Any) -> Any:
        options = torch.nn.LinearCrossEntropyOptions()
        return torch.nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)

    def plain(hidden: Any, weight: Any, labels: Any) -> Any:
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")

    loss_of = {"plain": plain, "chunked": chunked_cross_entropy, "liger": liger_cross_entropy, "torch": native,
               "chunked, 128 tokens": partial(chunked_cross_entropy, size=128)}[args.way]
    start_clean(device)
    torch.nn.functional.cross_entropy(hidden[:2] @ weight[:8].T, labels[:2] % 8).backward()  # libraries are loaded before we count
    hidden.grad = weight.grad = None
    before, seconds = peak_memory(device), []
    for _ in range(args.repeats):
        hidden.grad = weight.grad = None
        began = time.perf_counter()
        loss = loss_of(hidden, weight, labels)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"loss": args.way, "value": float(loss), "peak_bytes": peak_memory(device) - before, "seconds": statistics.median(seconds)}


def losses(args: argparse.Namespace) -> dict[str, Any]:
    """Every loss, each in a process of its own, so that peaks of memory do not mix; one that cannot run says why."""
    rows = []
    for way in ("plain", "chunked", "chunked, 128 tokens", "torch", "liger"):
        command = [sys.executable, __file__, "one-loss", "--way", way, *(f"--{key}={getattr(args, key)}" for key in ("rows", "width", "tokens", "repeats"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]
        rows.append(json.loads(last) if done.returncode == 0 else {"loss": way, "error": last})
        print(rows[-1], flush=True)
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.environ.get('OMP_NUM_THREADS', torch.get_num_threads())} CPU threads"
    return {"device": name, "rows": args.rows, "width": args.width, "tokens": args.tokens, "measured": rows}


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("mfu", help="model FLOPs utilisation of the training step")
    one.add_argument("--layers", type=int, nargs=2, default=[4, 8], help="two depths")
    one.add_argument("--length", type=int, default=4096)
    one.add_argument("--batch", type=int, default=8, help="sequences a step")
    one.add_argument("--micro-batch", type=int, default=2)
    one.add_argument("--steps", type=int, default=10, help="counted steps")
    one.add_argument("--loss", default="chunked", choices=("plain", "chunked", "liger"))
    one.add_argument("--attention", default="sdpa", choices=("sdpa", "flash_attention_2"))
    one.add_argument("--gradient-checkpointing", action="store_true")
    one.add_argument("--peak", type=float, default=0.0, help="FLOP/s of the device, where it is not known")
    one.add_argument("--full-layers", type=int, default=FULL_LAYERS)
    one.add_argument("--toy", action="store_true", help="a small shape, on any machine")
    two = commands.add_parser("loss", help="peak memory and time of the losses")
    three = commands.add_parser("one-loss", help="one of them, in this process")
    three.add_argument("--way", required=True)
    for each in (two, three):
        for name, value in (("--rows", 120_128), ("--width", 64), ("--tokens", 1024), ("--repeats", 3)):
            each.add_argument(name, type=int, default=value)
    for each in (one, two, three):
        each.add_argument("--json", type=Path, help="write the measurement here")
    args = parser.parse_args(given)
    if args.command == "mfu":
        args.shape = TOY if args.toy else SHAPE
        if args.toy:
            args.length, args.batch, args.micro_batch, args.steps = 64, 4, 2, 4
        if args.layers[0] == args.layers[1]:
            parser.error("--layers: two different depths")
    return args


def main(given: list[str] | None = None) -> None:
    """Measure, print, and write the JSON with its date."""
    args = arguments(given)
    found = {"mfu": mfu, "loss": losses, "one-loss": one_loss}[args.command](args)
    if args.command == "one-loss":
        print(json.dumps(found))
        return
    import torch

    record = {"command": "python benchmarks/training.py " + " ".join(given or sys.argv[1:]), "date": time.strftime("%Y-%m-%d"),
              "torch": torch.__version__, **found}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for way, row in record.get("extrapolated", {}).items():
        if row:
            print(f"{way}: {row['arithmetic']}; {row['tokens_per_second']:,.0f} tokens/s/GPU, {row['mfu']:.1%} of the peak, "
                  f"{row['gpu_hours_for_8B_tokens']:,.0f} GPU-hours for 8B tokens")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
