"""Small models with the real Mistral tokenizer, for tests of what trains and answers."""
import os
import subprocess
import sys
from pathlib import Path


def mistral_tokenizer(folder: Path):
    """The Mistral 7B v0.1 tokenizer with 64 padding tokens `<|extra_i|>`; the first is the pad token."""
    from shisa.base import base_tokenizer
    from shisa.models import load_tokenizer

    base_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token is None or not tokenizer.pad_token.startswith("<|extra_"):
        extra = [f"<|extra_{number}|>" for number in range(64)]
        tokenizer.add_special_tokens({"pad_token": extra[0], "additional_special_tokens": extra})
        tokenizer.save_pretrained(folder)
        tokenizer = load_tokenizer(folder)
    return tokenizer


def toy_model(folder: Path, tokenizer, hidden: int = 32, layers: int = 2, seed: int = 0):
    """A random Mistral model saved with the tokenizer in `folder`, loaded back through `shisa.train`."""
    import torch
    from shisa.models import load_model, save_model
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, sliding_window=None))
    save_model(model, tokenizer, folder)
    return load_model(folder)


def small_talks(count: int = 12) -> list[list[dict]]:
    """Short conversations of different lengths."""
    return [[{"role": "user", "content": f"{number}番目の質問です。" * (1 + number % 3)},
             {"role": "assistant", "content": f"答えは{number}です。" * (1 + number % 2)}] for number in range(count)]


def same_weights(one: Path, other: Path) -> bool:
    """True when both folders hold the same safetensors bytes."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    return bool(names) and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)




def lives(module: str, root: Path, kills: int) -> int:
    """Run lives.py on a test file's `life` with one thread; how many kills hit the inside of a save."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    done = subprocess.run([sys.executable, str(here / "lives.py"), module, str(root), str(kills)], capture_output=True, text=True,
                          timeout=900, check=False, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])
