"""Cost of sampling the texts for function drift, cached and as a plain loop: ``python -m bench.bench_sampled_texts``.

A random Llama of the shape of a small chat model (hidden 576, MLP 1536, vocabulary 49,152, tied), of few layers unless
told otherwise; ``--texts`` and ``--tokens`` as in `rlheals.spectra.sampled_texts`. Times are processor times, peaks are
resident memory of a process of its own beyond what building the model took. Both ways must write the same texts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from rlheals.spectra import sampled_texts

SEED, FIRST = 0, 1


def model(layers: int) -> Any:
    """The random model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            tie_word_embeddings=True,
            initializer_range=0.1,
        )
    ).eval()


def plain(network: Any) -> list[list[int]]:
    """Every text run anew for each of its tokens, with the logits of all places."""
    ids = torch.full((sampled_texts.TEXTS, 1), FIRST)
    generator = torch.Generator().manual_seed(SEED)
    with torch.inference_mode():
        while ids.shape[1] < sampled_texts.TOKENS:
            logits = network(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    rows: list[list[int]] = ids.tolist()
    return rows


def measure(way: str, layers: int) -> dict[str, Any]:
    """One way in this process."""
    network = model(layers)
    before, begin = peak(), time.process_time()
    texts = plain(network) if way == "plain" else sampled_texts.sample(network, FIRST, SEED)
    return {"seconds": time.process_time() - begin, "mib": peak() - before, "texts": texts}


def peak() -> float:
    """Largest resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run both ways, each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--texts", type=int, default=sampled_texts.TEXTS)
    parser.add_argument("--tokens", type=int, default=sampled_texts.TOKENS)
    parser.add_argument("--way", choices=("plain", "cached"))
    options = parser.parse_args()
    sampled_texts.TEXTS, sampled_texts.TOKENS = options.texts, options.tokens
    if options.way:
        print(json.dumps(measure(options.way, options.layers)))
        return
    found = {}
    for way in ("plain", "cached"):
        command = [sys.executable, "-m", "bench.bench_sampled_texts", "--way", way]
        command += [
            word for name in ("layers", "texts", "tokens") for word in (f"--{name}", str(getattr(options, name)))
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[way] = json.loads(done.stdout)
    same = found["plain"].pop("texts") == found["cached"].pop("texts")
    print(f"{options.texts} texts of {options.tokens} tokens, {options.layers} layers; same texts: {same}\n")
    print("| way | CPU seconds | MiB beyond the model |\n|---|---|---|")
    for way, each in found.items():
        print(f"| {way} | {each['seconds']:.1f} | {each['mib']:.0f} |")
    print(f"\nratio of CPU seconds {found['plain']['seconds'] / found['cached']['seconds']:.1f}")


if __name__ == "__main__":
    main()
