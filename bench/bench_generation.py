"""Generation speed of the engine against the library's own `generate`, on one thread, in CPU seconds.

Run: python -m bench.bench_generation [--answers 512] [--tokens 30]

All ways decode the same prompts greedily with the same random Llama of the mini profile's size, and must give the same
tokens. Ratios within one run are what counts; absolute speeds depend on the machine and its load.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import TYPE_CHECKING, Any

import torch

from rlheals.inference import Sampling
from rlheals.inference.transformers_engine import TransformersEngine
from rlheals.models.tiny import tiny_llama, tiny_tokenizer
from rlheals.params import Architecture

if TYPE_CHECKING:
    from collections.abc import Callable

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "->", *(f"w{place}" for place in range(219))]
PROMPT_TOKENS = 16


def mini_model() -> tuple[Any, Any]:
    """The mini profile's Llama, random, with wide initial weights so that no two tokens tie."""
    tokenizer = tiny_tokenizer(WORDS, pad="<pad>", bos="<s>", eos="</s>", unknown="<unk>")
    torch.manual_seed(0)
    shape = Architecture(
        hidden_size=128, layers=4, heads=4, kv_heads=4, intermediate_size=384, max_position_embeddings=320
    )
    model = tiny_llama(shape, tokenizer).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, tokenizer


def library(model: Any, prompts: list[list[int]], batch: int, tokens: int) -> list[list[int]]:
    """The library's `generate`; all prompts have one length, so no padding is needed."""
    out: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        ids = torch.tensor(prompts[start : start + batch])
        with torch.inference_mode():
            answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
        out += answer[:, ids.shape[1] :].tolist()
    return out


def cut(rows: list[list[int]], end: int) -> list[list[int]]:
    """Tokens before the end token."""
    return [row[: row.index(end)] if end in row else row for row in rows]


def timed(action: Callable[[], list[list[int]]]) -> tuple[list[list[int]], float]:
    """Result and CPU seconds; CPU time, because other work on the machine would spoil wall time."""
    start = time.process_time()
    result = action()
    return result, time.process_time() - start


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--answers", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--single", type=int, default=48, help="answers decoded one by one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = mini_model()
    draw = random.Random(0)
    prompts = [[draw.randrange(5, len(WORDS)) for _ in range(PROMPT_TOKENS)] for _ in range(arguments.answers)]
    library(model, prompts[:8], 8, 4)
    report: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    speeds, outputs = {}, {}
    for batch, count in ((1, arguments.single), (64, arguments.answers), (128, arguments.answers)):
        rows, seconds = timed(lambda batch=batch, count=count: library(model, prompts[:count], batch, arguments.tokens))
        outputs[f"generate, batch {batch}"] = cut(rows, tokenizer.eos_token_id)
        speeds[f"generate, batch {batch}"] = sum(map(len, outputs[f"generate, batch {batch}"])) / seconds
    for batch in (64, 128, 256, 512):
        engine = TransformersEngine(model, tokenizer, batch)
        rows, seconds = timed(
            lambda engine=engine: [a.token_ids for a in engine.generate(prompts, Sampling(arguments.tokens))]
        )
        outputs[f"engine, batch {batch}"] = rows
        speeds[f"engine, batch {batch}"] = sum(map(len, rows)) / seconds
    reference = outputs["engine, batch 256"]
    report["equal_share"] = {
        name: sum(a == b for a, b in zip(rows, reference, strict=False)) / len(rows) for name, rows in outputs.items()
    }
    report["tokens_per_cpu_second"] = {name: round(speed) for name, speed in speeds.items()}
    one, best_library = speeds["generate, batch 1"], max(v for k, v in speeds.items() if k.startswith("generate"))
    engine_256 = speeds["engine, batch 256"]
    report["engine_256_over_one_by_one"] = round(engine_256 / one, 1)
    report["engine_256_over_best_generate"] = round(engine_256 / best_library, 2)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
