from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rlheals.errors import UserError
from rlheals.models.tiny import tiny_llama, tiny_tokenizer
from rlheals.params import Architecture, Base
from rlheals.training.pretrain import encode, learning_rate, mean_loss, pretrain

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "->", *map(str, range(10))]
IDS = {word: i for i, word in enumerate(WORDS)}
SHAPE = Architecture(hidden_size=64, layers=2, heads=2, kv_heads=2, intermediate_size=96, max_position_embeddings=32)


def settings(**changes) -> Base:
    values = {
        "steps": 20, "batch_size": 8, "learning_rate": 3e-3, "weight_decay": 0.05, "warmup_steps": 4,
        "decay_fraction": 0.5, "state_every": 6, "mixture": {"read": 1.0},
    }  # fmt: skip
    return Base.model_validate(values | changes)


def rows(step: int) -> list[list[tuple[str, bool]]]:
    """Digits to be copied, a function of the step alone."""
    generator = np.random.default_rng([7, step])
    digits = [" ".join(map(str, generator.integers(0, 10, generator.integers(2, 5)))) for _ in range(8)]
    return [[(f"<bos> {text} ->", False), (f"{text} <eos>", True)] for text in digits]


def fresh():
    torch.manual_seed(3)
    return tiny_llama(SHAPE, tiny_tokenizer(WORDS, pad="<pad>", bos="<bos>", eos="<eos>", unknown="<unk>"))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_learning_rate_warms_up_holds_and_decays_to_zero():
    values = [learning_rate(step, settings()) for step in range(20)]
    assert values[0] == pytest.approx(3e-3 / 4)
    assert values[4:10] == pytest.approx([3e-3] * 6)
    assert values[-1] == pytest.approx(3e-4)
    assert sorted(values[10:], reverse=True) == values[10:]


def test_loss_is_the_mean_over_trained_tokens_only():
    model = fresh().eval()
    batch = rows(0)
    inputs, targets = encode(batch, IDS, IDS["<pad>"])
    total, count = 0.0, 0
    for row in batch:  # oracle: one unpadded row at a time, full logits
        ids = torch.tensor([[IDS[word] for text, _ in row for word in text.split()]])
        prompt = len(row[0][0].split())
        log_probabilities = model(ids).logits.log_softmax(-1)[0, prompt - 1 : -1]
        answer = ids[0, prompt:]
        total -= log_probabilities.gather(1, answer[:, None]).sum().item()
        count += len(answer)
    assert mean_loss(model, inputs, targets).item() == pytest.approx(total / count, rel=1e-5)


def test_loss_falls_and_the_curve_is_logged(tmp_path: Path):
    curve = pretrain(fresh(), rows, IDS, IDS["<pad>"], settings(steps=60), tmp_path)
    assert [record["step"] for record in curve] == [10, 20, 30, 40, 50, 60]
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]


def test_resume_is_byte_identical(tmp_path: Path):
    whole = fresh()
    curve = pretrain(whole, rows, IDS, IDS["<pad>"], settings(), tmp_path / "whole")

    class Stop(Exception):
        pass

    def killed(step: int) -> list[list[tuple[str, bool]]]:
        if step == 15:
            raise Stop
        return rows(step)

    with pytest.raises(Stop):
        pretrain(fresh(), killed, IDS, IDS["<pad>"], settings(), tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["state-12"]
    torch.manual_seed(99)  # a resumed process has other weights before it loads the state
    resumed = tiny_llama(SHAPE, tiny_tokenizer(WORDS, pad="<pad>", bos="<bos>", eos="<eos>", unknown="<unk>"))
    assert pretrain(resumed, rows, IDS, IDS["<pad>"], settings(), tmp_path / "cut") == curve
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


def test_half_written_state_is_ignored(tmp_path: Path):
    (tmp_path / "state.partial").mkdir(parents=True)
    (tmp_path / "state.partial" / "state.safetensors").write_bytes(b"half")
    whole, other = fresh(), fresh()
    pretrain(whole, rows, IDS, IDS["<pad>"], settings(), tmp_path)
    pretrain(other, rows, IDS, IDS["<pad>"], settings(), tmp_path / "clean")
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(whole).items())


def test_damaged_state_is_told_deleted_and_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole, other = fresh(), fresh()
    pretrain(whole, rows, IDS, IDS["<pad>"], settings(), tmp_path)
    state = tmp_path / "state-18"
    weights_file = state / "state.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    pretrain(other, rows, IDS, IDS["<pad>"], settings(), tmp_path)
    assert str(state) in capsys.readouterr().err
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(whole).items())


def test_divergence_is_one_sentence(tmp_path: Path):
    model = fresh()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"loss is nan at step 0; lower base\.learning_rate"):
        pretrain(model, rows, IDS, IDS["<pad>"], settings(), tmp_path)


def test_state_that_does_not_fit_the_disk_is_one_sentence_and_leaves_no_state(tmp_path: Path):
    script = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from tests.training.test_pretrain import IDS, fresh, pretrain, rows, settings
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        from rlheals.errors import UserError
        try:
            pretrain(fresh(), rows, IDS, 0, settings(), Path(sys.argv[1]))
        except UserError as error:
            print(error)
            raise SystemExit(2)
        """
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "s"), str(root)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "nothing was published" in done.stdout
    assert not list((tmp_path / "s").glob("state-*"))


@pytest.mark.fault
@pytest.mark.slow
def test_kill_at_any_instant_then_resume(tmp_path: Path):
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from tests.training.test_pretrain import IDS, fresh, pretrain, rows, settings
        model = fresh()
        pretrain(model, rows, IDS, 0, settings(steps=400, state_every=1), Path(sys.argv[1]))
        model.save_pretrained(Path(sys.argv[1]) / "done")
        """
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script, str(tmp_path), str(root)]
    for delay in (0.3, 0.7, 1.1):
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not list(tmp_path.glob("state-*")):
            time.sleep(0.05)
            assert child.poll() is None
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert (tmp_path / "done" / "model.safetensors").is_file()
