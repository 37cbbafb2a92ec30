"""A module that tests launch: `python -m launch_toys CONFIG.json`, without a model."""
import json
import os
import signal
import time
from pathlib import Path

from shisa.config import ShisaError
from shisa.launch import worker

RANK = int(os.environ.get("RANK", "0"))


def work(config: dict) -> None:
    """What the config's `do` says; `at` is a folder where ranks leave their process ids."""
    at = Path(config["at"])
    (at / f"pid-{RANK}").write_text(str(os.getpid()))
    print(f"progress\trank {RANK} of {os.environ.get('WORLD_SIZE', '1')}", flush=True)
    globals()[config["do"]](at)


def nothing(at: Path) -> None:
    """End well."""


def sleep(at: Path) -> None:
    """Go on for a minute."""
    time.sleep(60)


def refuse(at: Path) -> None:
    """Every rank says no."""
    raise ShisaError("the checkpoint was written by 4 processes, there are 2; set processes to 4")


def fail(at: Path) -> None:
    """Rank 1 raises while the others wait for it."""
    if RANK == 1:
        raise ValueError("row 17 of the table\nis empty")
    time.sleep(60)


def hang(at: Path) -> None:
    """Rank 1 kills itself; rank 0 waits for it in a collective, deaf to SIGTERM."""
    import torch.distributed as dist

    signal.signal(signal.SIGTERM, lambda *_: None)
    dist.init_process_group("gloo")
    dist.barrier()
    if RANK == 1:
        print("killing", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    while True:  # a collective that does not notice: as NCCL's
        time.sleep(1)


def count(at: Path) -> None:
    """Twelve steps, each summed over the ranks; goes on from the last step that is on disk."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    log = at / "log.json"
    rows = json.loads(log.read_text()) if log.is_file() else []
    begun = len(rows)
    for step in range(begun, 12):
        total = torch.tensor([float(RANK + 1)])
        dist.all_reduce(total)
        rows.append({"step": step, "sum": total.item(), "begun": begun})
        if RANK == 0:
            (at / "half").write_text(json.dumps(rows))
            os.replace(at / "half", log)
            print(f"progress\tstep {step + 1}", flush=True)
        time.sleep(0.25)
    dist.destroy_process_group()


def training_spec(folder: Path, micro_batch: int) -> dict:
    """A toy model and packed file as 31_pretrain's `train` wants them."""
    from shisa.base import base_tokenizer, new_model
    from shisa.models import load_tokenizer, save_model
    from shisa.packing import cut, encode_documents, pack

    base_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    save_model(new_model(len(tokenizer), 8, 1, 2, 64, 0), tokenizer, folder / "model")
    texts = [f"Number {i} comes after number {i - 1}." * (1 + i % 5) for i in range(80)]
    pack(cut(encode_documents(tokenizer, texts), 32), 32, pad_id=0).save(folder / "packed.parquet")
    training = {"steps": 12, "batch": 4, "micro_batch": micro_batch, "learning_rate": 1e-2, "checkpoint_every": 3, "warmup": 2}
    return {"model": str(folder / "model"), "packed": str(folder / "packed.parquet"), "settings": training}


def placed(spec: dict, folder: Path, **changes) -> tuple[dict, Path]:
    """The spec with places of its own, and the file it is written to."""
    folder.mkdir(parents=True)
    own = {**spec, **changes, "checkpoints": str(folder / "checkpoints"), "output": str(folder / "trained")}
    (folder / "config.json").write_text(json.dumps(own))
    return own, folder / "config.json"


if __name__ == "__main__":
    worker(work)
