"""What tests/inference/test_vllm_several.py runs: engines over several processes, and on a GPU.

Run: python -m tests.inference.vllm_several tensor_parallel|gpu ROOT
     python -m torch.distributed.run --nproc_per_node 2 -m tests.inference.vllm_several ranks ROOT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rlheals.stages.common import quiet_environment

quiet_environment(1)


def tensor_parallel(root: Path) -> dict[str, Any]:
    """One model over two workers, whose weights go through a file."""
    from rlheals.inference.vllm import VllmSettings

    return swapped(root, VllmSettings(max_sequences=16, memory_fraction=0.02, tensor_parallel=2))


def gpu(root: Path) -> dict[str, Any]:
    """A model in float32 on a CUDA device."""
    from rlheals.inference.vllm import VllmSettings

    return swapped(root, VllmSettings(device="cuda", max_sequences=16, memory_fraction=0.3))


def swapped(root: Path, settings: Any) -> dict[str, Any]:
    """A started engine that gets the weights of another model, beside transformers with those weights."""
    from rlheals.inference import Sampling
    from rlheals.inference.fingerprint import Proof, fingerprint, gap
    from rlheals.inference.live import serve
    from rlheals.inference.transformers_engine import TransformersEngine
    from rlheals.inference.vllm.engine import VllmEngine
    from rlheals.models.checkpoint import load_model, load_tokenizer
    from tests.common import make_folder
    from tests.inference.vllm_program import differences, prompts

    shape = {"num_attention_heads": 2, "num_key_value_heads": 2}
    first, second = (make_folder(root / str(seed), "llama", seed, **shape) for seed in (0, 1))
    tokenizer = load_tokenizer(first)
    engine = VllmEngine(first, tokenizer, settings)
    model, asked, sampling = load_model(second), prompts(8, len(tokenizer)), Sampling(8, logprobs=True)
    started = gap(engine.fingerprint(), fingerprint(load_model(first)))
    proof: Proof = serve(engine, model, "the second")
    expected = TransformersEngine(load_model(second), tokenizer, 8).generate(asked, sampling)
    found = differences(engine.generate(asked, sampling), expected)
    engine.close()
    return {"started": started, "swapped": gap(*proof), **found}


def ranks(root: Path) -> dict[str, Any]:
    """A PPO branch of two processes, each with an engine of its own."""
    from dataclasses import replace

    from rlheals.reporting.schemas import read_table
    from rlheals.stages.common import Run
    from rlheals.stages.ppo import ppo
    from tests.stages.test_probe_rl import params
    from tests.stages.vllm_program import VLLM

    change = "ppo.change={minibatch: 4, micro_batch: 2, critic_warmup_updates: 0, least_readable: 0.0}"
    branch = Run(params(*VLLM, "ppo.rollouts=vllm", "ppo.episodes=8", change), "tiny", 0, root)
    branch = replace(branch, start=3, arm="ppo")
    ppo(branch)
    if os.environ["RANK"] != "0":
        return {}
    rows = read_table(branch.branch("ppo", 3) / "rl_training.parquet", "rl_training")
    return {"engine": rows["engine_ratio_deviation"].to_list(), "episodes": rows["episodes"].to_list()}


if __name__ == "__main__":
    told = {"tensor_parallel": tensor_parallel, "gpu": gpu, "ranks": ranks}[sys.argv[1]](Path(sys.argv[2]))
    if told:
        print(json.dumps(told))
