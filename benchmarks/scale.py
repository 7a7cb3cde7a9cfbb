"""Peak anonymous memory of merging R1 into a LLaMA-2-7B-shaped checkpoint of random weights, made on disk.

A massive token is planted: one channel of the newline's embedding is 300 times the others.
"""

import json
import shutil
import threading
import time
from pathlib import Path

import click
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from dfrot_lab import checkpoints, rotations
from dfrot_lab.rotations import Rotations

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
}


def make(folder: Path, layers: int) -> None:
    """A checkpoint of `layers` layers in fp16, a shard a layer."""
    folder.mkdir(parents=True)
    d, inner, words = (SHAPE[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    generator, where = torch.Generator().manual_seed(0), {}

    def random(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).half()

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    embedding = random(words, d)
    embedding[13, d // 3] = 300 / d**0.5
    ends = {"model.embed_tokens.weight": embedding, "lm_head.weight": random(words, d)}
    shard("ends.safetensors", ends | {"model.norm.weight": torch.full((d,), 1.5).half()})
    for i in tqdm(range(layers), desc="making", unit="layer"):
        stem = f"model.layers.{i}"
        weights = {f"self_attn.{n}_proj": (d, d) for n in "qkvo"}
        weights |= {
            "mlp.gate_proj": (inner, d),
            "mlp.up_proj": (inner, d),
            "mlp.down_proj": (d, inner),
        }
        tensors = {f"{stem}.{n}.weight": random(*s) for n, s in weights.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}.{norm}.weight"] = torch.full((d,), 0.7).half()
        shard(f"layer-{i:02d}.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def anonymous() -> int:
    """RssAnon in kB: memory that is not mapped from a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1])
    raise SystemExit("no RssAnon in /proc/self/status: this measurement needs Linux")


@click.command()
@click.option("--layers", default=32, help="LLaMA-2-7B has 32.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("results/scale"))
@click.option("--keep", is_flag=True, help="Leave both checkpoints on disk.")
def main(layers: int, folder: Path, keep: bool) -> None:
    """Make the checkpoint unless it is there, merge, check one weight, print peak and time."""
    source, target = folder / f"source-{layers}", folder / f"merged-{layers}"
    if not source.exists():
        partial = folder / f".partial-source-{layers}"
        shutil.rmtree(partial, ignore_errors=True)
        make(partial, layers)
        partial.rename(source)
    shutil.rmtree(target, ignore_errors=True)
    r1 = rotations.random_hadamard(SHAPE["hidden_size"], 0)
    peak, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        checkpoints.merge(source, target, Rotations(R1=r1))
    finally:
        done.set()
        watcher.join()
    seconds = time.perf_counter() - start
    name, file = "model.layers.0.mlp.down_proj.weight", "layer-00.safetensors"
    with safe_open(source / file, "pt") as a, safe_open(target / file, "pt") as b:
        wanted = r1[:, :64].mT @ a.get_tensor(name).double()
        found = b.get_tensor(name)[:64].double()
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert error < 1e-3, f"the merged weight is off by {error:.1e}"
    bytes_ = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    print(f"{layers} layers, {bytes_ / 1e9:.1f} GB of fp16: merged in {seconds:.0f} s")
    print(
        f"peak anonymous memory {peak[0] / 1048576:.2f} GiB; error of a merged weight {error:.1e}"
    )
    if not keep:
        shutil.rmtree(target)
        shutil.rmtree(source)


if __name__ == "__main__":
    main()
