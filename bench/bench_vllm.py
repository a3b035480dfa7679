"""vLLM beside transformers on a CPU: tokens a second by model size, start-up, swaps, and a grid of 100 models.

Run: OMP_NUM_THREADS=1 python -m bench.bench_vllm [--sizes 1M 10M 100M] [--rounds 3] [--models 100]

Every figure comes from a process of its own, because vLLM changes its process, and the ways of a size take turns for
``--rounds``, so that a drift of the machine's speed meets all of them; the best round counts. Speeds are generated
tokens a processor second on one thread, greedy, float32, random Llamas, prompts of 16 to 63 tokens. "batched" is the
project's own engine at its default batch, "batch 1" is `model.generate` with one prompt after the other. The answers of
vLLM and of the batched engine must be the same tokens. Start-ups are wall-clock seconds of a whole process that
imports, starts, answers 8 prompts and ends; the second and later starts of an architecture count, the first also fills
vLLM's cache of model descriptions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

NAMES = {"1M": 1_000_000, "10M": 10_000_000, "100M": 100_000_000}
SHAPES = {  # hidden size, layers, heads, width of the MLP
    "1M": (128, 4, 4, 384),
    "10M": (384, 6, 6, 1024),
    "100M": (768, 12, 12, 3072),
}
PROMPTS = {"1M": 512, "10M": 512, "100M": 64}
SINGLE = 16
TOKENS = {"1M": 64, "10M": 64, "100M": 32}
BATCH = 256
WAYS = ("vllm", "batched", "batch 1")
STARTS = 5
GRID_PROMPTS, GRID_TOKENS = 8, 8
CHANGE = 0.01
"""Size of the random change that makes one model of the grid from the first."""


def make_model(size: str, folder: Path) -> None:
    """A random Llama of one size with the mini profile's kind of tokenizer, as a folder."""
    import torch

    from bench.bench_generation import WORDS
    from rlheals.models.checkpoint import save_model
    from rlheals.models.tiny import tiny_llama, tiny_tokenizer
    from rlheals.params import Architecture

    width, layers, heads, inner = SHAPES[size]
    tokenizer = tiny_tokenizer(WORDS, pad="<pad>", bos="<s>", eos="</s>", unknown="<unk>")
    torch.manual_seed(0)
    shape = Architecture(
        hidden_size=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=320,
    )
    model = tiny_llama(shape, tokenizer)
    for parameter in model.parameters():  # wide, so that no two tokens tie
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2 * (128 / width) ** 0.5)
    save_model(model, tokenizer, folder)


def prompts_for(count: int, vocabulary: int) -> list[list[int]]:
    """Random prompts of 16 to 63 tokens."""
    draw = random.Random(0)
    return [[draw.randrange(5, vocabulary) for _ in range(draw.randrange(16, 64))] for _ in range(count)]


def make_engine(way: str, folder: Path) -> Any:
    """The engine of a way; for "batch 1" the model itself."""
    from rlheals.inference.transformers_engine import TransformersEngine
    from rlheals.inference.vllm import VllmSettings
    from rlheals.inference.vllm.engine import VllmEngine
    from rlheals.models.checkpoint import load_model, load_tokenizer

    if way == "vllm":
        return VllmEngine(folder, load_tokenizer(folder), VllmSettings(max_sequences=BATCH))
    model = load_model(folder)
    return model if way == "batch 1" else TransformersEngine(model, load_tokenizer(folder), BATCH)


def answer(way: str, engine: Any, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Greedy tokens of every prompt."""
    import torch

    from rlheals.inference import Sampling

    if way != "batch 1":
        return [each.token_ids for each in engine.generate(prompts, Sampling(tokens))]
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = engine.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
        rows.append(out[0, len(prompt) :].tolist())
    return rows


def speed(way: str, size: str, folder: Path) -> dict[str, Any]:
    """Generated tokens a processor second."""
    engine = make_engine(way, folder)
    vocabulary = 224
    prompts = prompts_for(SINGLE if way == "batch 1" else PROMPTS[size], vocabulary)
    answer(way, engine, prompts[:4], 4)
    begin, wall = time.process_time(), time.perf_counter()
    rows = answer(way, engine, prompts, TOKENS[size])
    seconds, wall = time.process_time() - begin, time.perf_counter() - wall
    count = sum(map(len, rows))
    return {"speed": count / seconds, "wall": count / wall, "rows": rows[:64], "prompts": len(prompts)}


def states(folder: Path, count: int) -> list[dict[str, Tensor]]:
    """Weights of ``count`` models, each a random change of the first in every matrix."""
    import torch

    from rlheals.models.checkpoint import load_state

    first = load_state(folder)
    draw = torch.Generator().manual_seed(0)
    return [
        {
            name: t + CHANGE * torch.randn(t.shape, generator=draw) * t.std() if t.ndim == 2 else t
            for name, t in first.items()
        }
        for _ in range(count)
    ]


def grid(way: str, count: int, folder: Path) -> dict[str, Any]:
    """Seconds for ``count`` models: one vLLM that is swapped, or a transformers model loaded from disk for each."""
    from safetensors.torch import save_file

    from rlheals.inference import Sampling
    from rlheals.inference.live import serve
    from rlheals.inference.transformers_engine import TransformersEngine
    from rlheals.models.checkpoint import load_model, load_tokenizer

    prompts, tokenizer = prompts_for(GRID_PROMPTS, 224), load_tokenizer(folder)
    all_states = states(folder, count)
    engine, trainer = (make_engine("vllm", folder) if way == "vllm" else None), load_model(folder)
    rows: list[list[list[int]]] = []
    swaps: list[float] = []
    begin = time.perf_counter()
    for state in all_states:
        if engine is None:
            save_file(state, folder / "model.safetensors", {"format": "pt"})
            begin_one = time.perf_counter()
            live = TransformersEngine(load_model(folder), tokenizer, BATCH)
        else:
            live, begin_one = engine, time.perf_counter()
            trainer.load_state_dict(state)
            serve(live, trainer, "a model of the grid")
        swaps.append(time.perf_counter() - begin_one)
        rows.append([each.token_ids for each in live.generate(prompts, Sampling(GRID_TOKENS))])
    return {"seconds": time.perf_counter() - begin, "rows": rows, "swap": sorted(swaps)[len(swaps) // 2]}


def start(way: str, folder: Path) -> dict[str, Any]:
    """Start, answer, end; the caller times the process."""
    return {"rows": answer(way, make_engine(way, folder), prompts_for(GRID_PROMPTS, 224), GRID_TOKENS)}


def swap(repeats: int, folder: Path) -> dict[str, Any]:
    """Milliseconds of a full reload from disk, of a push, and of apply + revert of an edit of every matrix.

    The proof is what every swap of ours ends with: the sentinels by vLLM and by the model in this process.
    """
    from rlheals.inference.fingerprint import fingerprint
    from rlheals.models.checkpoint import load_model, load_state
    from rlheals.restoration.served import ServedModel

    engine, model = make_engine("vllm", folder), load_model(folder)
    state = load_state(folder)
    changes = {name: tensor + 0.01 for name, tensor in state.items() if "proj" in name}
    live = ServedModel(engine, state, model)

    def reload() -> None:
        engine._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        engine._llm.reset_prefix_cache()

    def prove() -> None:
        engine.fingerprint()
        fingerprint(model)

    def reload_and_prove() -> None:
        reload()
        prove()

    def cell() -> None:
        with live.edited(changes):
            pass

    actions: dict[str, Callable[[], None]] = {
        "reload": reload,
        "reload and proof": reload_and_prove,
        "push": lambda: engine.swap(state),
        "proof": prove,
        "cell": cell,
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            begin = time.perf_counter()
            action()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: sorted(each)[len(each) // 2] for name, each in times.items()}


def child(*words: str) -> dict[str, Any]:
    """The result of one measurement in a process of its own."""
    command = [sys.executable, "-m", "bench.bench_vllm", "--child", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_child(words: list[str]) -> dict[str, Any]:
    """What a child does: ``speed WAY SIZE FOLDER``, ``grid WAY N FOLDER``, ``start WAY FOLDER``, ``swap N FOLDER``."""
    from rlheals.stages.common import quiet_environment

    quiet_environment(int(os.environ.get("OMP_NUM_THREADS", "1")))
    kind, *rest = words
    folder = Path(rest[-1])
    if kind == "speed":
        return speed(rest[0], rest[1], folder)
    if kind == "grid":
        return grid(rest[0], int(rest[1]), folder)
    return start(rest[0], folder) if kind == "start" else swap(int(rest[0]), folder)


def speed_table(sizes: Sequence[str], rounds: int, root: Path) -> Table:
    """Speeds of every size and way, and what ``auto`` would pick."""
    from rlheals.inference.choice import nearest

    table = Table(title="generated tokens a processor second, one thread (prompts)")
    for column in ("model", *WAYS, "vllm / batched", "vllm / batch 1", "equal answers", "faster", "auto"):
        table.add_column(column, justify="right")
    for size in sizes:
        folder = root / size
        best: dict[str, dict[str, Any]] = {}
        for _ in range(rounds):
            for way in WAYS:
                found = child("speed", way, size, str(folder))
                if way not in best or found["speed"] > best[way]["speed"]:
                    best[way] = found
        speeds = {way: best[way]["speed"] for way in WAYS}
        equal = sum(a == b for a, b in zip(best["vllm"]["rows"], best["batched"]["rows"], strict=True))
        row = nearest(NAMES[size])
        table.add_row(
            size,
            *(f"{speeds[way]:,.0f} ({best[way]['prompts']})" for way in WAYS),
            f"{speeds['vllm'] / speeds['batched']:.2f}",
            f"{speeds['vllm'] / speeds['batch 1']:.1f}",
            f"{equal}/{len(best['vllm']['rows'])}",
            "vllm" if speeds["vllm"] > speeds["batched"] else "transformers",
            "vllm" if row.vllm > row.transformers else "transformers",
        )
    return table


def swap_table(sizes: Sequence[str], root: Path) -> Table:
    """Milliseconds of swaps."""
    table = Table(title="swaps of a live vLLM, milliseconds, median")
    columns = ("reload", "reload and proof", "push", "proof", "cell")
    for column in ("model", *columns, "cell / reload", "cell / reload and proof"):
        table.add_column(column, justify="right")
    for size in sizes:
        found = child("swap", "15", str(root / size))
        ratios = (found["cell"] / found["reload"], found["cell"] / found["reload and proof"])
        table.add_row(size, *(f"{found[name]:.1f}" for name in columns), *(f"{ratio:.2f}" for ratio in ratios))
    return table


def grid_table(count: int, root: Path) -> Table:
    """A grid of models by three ways."""
    folder = root / "1M"
    swapped = child("grid", "vllm", str(count), str(folder))
    starts = []
    for _ in range(STARTS):
        begin = time.perf_counter()
        child("start", "vllm", str(folder))
        starts.append(time.perf_counter() - begin)
    one_start = sum(starts) / STARTS
    reloaded = child("grid", "transformers", str(count), str(folder))
    equal = sum(a == b for a, b in zip(swapped["rows"], reloaded["rows"], strict=True))
    table = Table(
        title=f"{count} models of 1 M, {GRID_PROMPTS} prompts × {GRID_TOKENS} tokens each; {equal} equal answers"
    )
    for column in ("way", "seconds", "over one engine"):
        table.add_column(column, justify="right")
    base = swapped["seconds"]
    table.add_row(f"one vLLM, swapped ({1e3 * swapped['swap']:.0f} ms a swap with its proof)", f"{base:.1f}", "1")
    table.add_row(
        f"a vLLM started for each ({STARTS} starts of {one_start:.1f} s, extrapolated)",
        f"{count * one_start:.0f}",
        f"{count * one_start / base:.0f}",
    )
    table.add_row(
        "transformers, loaded from disk for each", f"{reloaded['seconds']:.1f}", f"{reloaded['seconds'] / base:.2f}"
    )
    return table


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run_child(arguments.child)))
        return
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for size in {*arguments.sizes, "1M"}:
            make_model(size, root / size)
        child("start", "vllm", str(root / "1M"))
        console.print(speed_table(arguments.sizes, arguments.rounds, root))
        console.print(swap_table(arguments.sizes, root))
        console.print(grid_table(arguments.models, root))


if __name__ == "__main__":
    main()
