from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from rlheals.errors import UserError
from rlheals.evaluation.dialogue import Dialogue, EncodedRow
from rlheals.evaluation.losses import teacher_forced_loss
from rlheals.models.checkpoint import load_model, load_tokenizer
from rlheals.publish import MANIFEST, verify
from rlheals.training.sft import RUNGS, STATES, Curves, SftRun, make_trainer, newest_state, train_sft
from tests.common import make_model, make_params, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.params import Sft

STEPS = 9
RUNG_STEPS = [0, 1, 4, 9]


def settings(**changes: Any) -> Sft:
    small = {
        "steps": STEPS,
        "checkpoints": RUNG_STEPS,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "schedule": "constant",
        "warmup_steps": 2,
        "loss_every": 3,
        "state_every": 4,
        "max_length": 96,
    }
    return make_params().sft.model_copy(update={**small, **changes})


def texts(count: int, shift: int = 0) -> list[tuple[str, str]]:
    """Sums: prompts and answers of different lengths."""
    rows = []
    for place in range(count):
        numbers = [(7 * place + 3 * k + shift) % 30 for k in range(2 + place % 3)]
        rows.append(("sum of " + " ".join(map(str, numbers)), " ".join(str(n + 1) for n in numbers)))
    return rows


def make_run(scratch: Path, family: str = "words", rows: int = 14, **changes: Any) -> SftRun:
    """14 rows in batches of 4: epochs end in the middle of the ladder, with a ragged batch."""
    tokenizer = make_tokenizer(family)
    speak = Dialogue(tokenizer)
    sets = {
        "train_id": speak.encode(texts(5)),
        "test_id": speak.encode(texts(5, 50)),
        "ood": speak.encode(texts(6, 90)),
    }
    return SftRun(tokenizer, speak.encode(texts(rows)), sets, settings(**changes), seed=3, scratch=scratch)


def train(run: SftRun, family: str = "words") -> Curves:
    return train_sft(make_model(family, run.tokenizer, seed=1), run)


def tree(scratch: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(scratch)): file.read_bytes() for file in (scratch / RUNGS).rglob("*") if file.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[SftRun, Curves]:
    run = make_run(tmp_path_factory.mktemp("sft"))
    return run, train(run)


def test_every_rung_loads_by_itself(finished: tuple[SftRun, Curves]) -> None:
    run, _ = finished
    rungs = sorted(path.name for path in (run.scratch / RUNGS).iterdir())
    assert rungs == sorted(f"checkpoint-{step}" for step in RUNG_STEPS)
    digests = set()
    for rung in rungs:
        folder = run.scratch / RUNGS / rung
        model, tokenizer = load_model(folder), load_tokenizer(folder)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
        assert tokenizer.chat_template == run.tokenizer.chat_template
        assert not {"training_args.bin", "README.md"} & {file.name for file in folder.iterdir()}
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
        digests.add((folder / "model.safetensors").read_bytes())
    assert len(digests) == len(rungs)


def test_rung_zero_is_the_model_that_came_in(finished: tuple[SftRun, Curves]) -> None:
    run, _ = finished
    state = load_file(run.scratch / RUNGS / "checkpoint-0" / "model.safetensors")
    for name, tensor in make_model("words", run.tokenizer, seed=1).state_dict().items():
        assert torch.equal(state[name], tensor)


def test_losses_are_those_of_the_saved_rungs(finished: tuple[SftRun, Curves]) -> None:
    run, curves = finished
    assert {row["step"] for row in curves.losses} == {0, 1, 3, 4, 6, 9}
    assert len(curves.losses) == 6 * 3
    for row in curves.losses:
        if row["step"] in RUNG_STEPS:
            model = load_model(run.scratch / RUNGS / f"checkpoint-{row['step']}")
            loss = teacher_forced_loss(model, run.loss_sets[row["series"]])
            assert row["nll_per_token"] == pytest.approx(loss.nll_per_token, rel=1e-6)
            assert row["tokens"] == loss.tokens


def test_the_training_curve_has_a_row_a_step(finished: tuple[SftRun, Curves]) -> None:
    run, curves = finished
    assert [row["step"] for row in curves.training] == list(range(1, STEPS + 1))
    assert curves.training[-1]["loss"] < curves.training[0]["loss"]
    assert [row["learning_rate"] for row in curves.training[:3]] == [1.5e-3, 3e-3, 3e-3]
    assert all(row["gradient_norm"] > 0 for row in curves.training)
    lengths = [len(row.prompt) + len(row.completion) for row in run.rows]
    assert sum(row["tokens"] for row in curves.training[:4]) == sum(lengths)  # 4 + 4 + 4 + 2 rows: one epoch


def bare_loop(run: SftRun, order: list[list[EncodedRow]]) -> Any:
    """An independent oracle: plain torch, one row at a time, the mean over the completion tokens of a batch."""
    model = make_model("words", run.tokenizer, seed=1).train()
    wanted = run.settings
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=wanted.adam_betas, eps=wanted.adam_epsilon, weight_decay=wanted.weight_decay
    )
    for step, batch in enumerate(order):
        total = torch.zeros(())
        for row in batch:
            logits = model(torch.tensor([row.prompt + row.completion])).logits[0]
            picked = torch.log_softmax(logits[len(row.prompt) - 1 : -1], -1)
            total = total - picked.gather(-1, torch.tensor(row.completion)[:, None]).sum()
        (total / sum(len(row.completion) for row in batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), wanted.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = wanted.learning_rate * min(1, (step + 1) / 2)
        optimizer.step()
        optimizer.zero_grad()
    return model


def batches(run: SftRun, count: int) -> list[list[EncodedRow]]:
    """The rows of the trainer's own first batches, read back from its data loader."""
    trainer = make_trainer(make_model("words", run.tokenizer, seed=1), run)
    by_tokens = {tuple(row.prompt + row.completion): row for row in run.rows}
    found = []
    for batch, _ in zip(trainer.get_train_dataloader(), range(count), strict=False):
        rows = [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        found.append([by_tokens[tuple(row)] for row in rows])
        for row, labels in zip(found[-1], batch["labels"], strict=True):
            assert labels[labels != -100].tolist() == row.completion
            assert (labels[: len(row.prompt)] == -100).all()
    return found


def test_four_steps_equal_a_bare_torch_loop(finished: tuple[SftRun, Curves], tmp_path: Path) -> None:
    run, _ = finished
    expected = bare_loop(run, batches(make_run(tmp_path), 4)).state_dict()
    state = load_file(run.scratch / RUNGS / "checkpoint-4" / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=2e-5)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    finished: tuple[SftRun, Curves], tmp_path: Path
) -> None:
    run, curves = finished
    again = make_run(tmp_path / "again")
    assert train(again) == curves
    assert tree(again.scratch) == tree(run.scratch)
    other = SftRun(**{**vars(make_run(tmp_path / "other")), "seed": 4})
    assert train(other) != curves


class Stop(BaseException):
    """Stands in for a kill: nothing in the trainer catches it."""


@pytest.mark.parametrize("at", [1, 3, 5, 7, 8])
def test_resume_is_exact_to_the_byte(
    finished: tuple[SftRun, Curves], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Stopped before, between and after the states of steps 4 and 8; epochs have 4 steps, the last one ragged."""
    from rlheals.training.sft import Ladder

    whole, curves = finished
    run = make_run(tmp_path)
    original = Ladder.on_step_end

    def stop(self: Ladder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == at:
            raise Stop

    monkeypatch.setattr(Ladder, "on_step_end", stop)
    with pytest.raises(Stop):
        train(run)
    monkeypatch.undo()
    kept = newest_state(run.scratch)
    assert (int(kept.name.split("-")[1]) if kept else 0) == 4 * ((at - 1) // 4)
    assert train(run) == curves
    assert tree(run.scratch) == tree(whole.scratch)
    assert train(run) == curves  # once more after the end: nothing left to do


def test_a_half_written_state_is_ignored(finished: tuple[SftRun, Curves], tmp_path: Path) -> None:
    whole, curves = finished
    run = make_run(tmp_path)
    train(run)
    state = run.scratch / STATES / f"checkpoint-{STEPS}"
    assert newest_state(run.scratch) == state
    assert [path.name for path in state.parent.glob("checkpoint-*")] == [state.name]
    (state / MANIFEST).unlink()
    (state / "model.safetensors").write_bytes(b"half")
    assert newest_state(run.scratch) is None
    assert not state.exists()
    assert train(run) == curves
    assert tree(run.scratch) == tree(whole.scratch)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json", "curves.json"])
def test_an_altered_state_is_told_deleted_and_not_used(
    finished: tuple[SftRun, Curves], tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    whole, curves = finished
    run = make_run(tmp_path)
    shutil.copytree(whole.scratch, run.scratch, dirs_exist_ok=True)
    state = newest_state(run.scratch)
    assert state is not None
    assert file in verify(state)
    older = state.with_name("checkpoint-8")
    shutil.copytree(state, older)
    (state / file).write_bytes((state / file).read_bytes()[:-9])
    capsys.readouterr()
    assert newest_state(run.scratch) == older
    assert capsys.readouterr().err == f"{state} is damaged and was deleted; an earlier state is used, if any.\n"
    (older / file).write_bytes(b"")
    assert train(run) == curves
    assert tree(run.scratch) == tree(whole.scratch)


PROGRAM = """
import os, sys
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.training.test_sft import make_run, train
train(make_run(Path(sys.argv[1])))
"""


@pytest.mark.fault
@pytest.mark.slow
def test_killed_while_writing_it_resumes_to_the_same_bytes(finished: tuple[SftRun, Curves], tmp_path: Path) -> None:
    """Each child gets SIGKILL the moment a state begins to appear, so it is cut while writing it."""
    whole, curves = finished
    for begun in ("checkpoint-4", "checkpoint-8/optimizer.pt"):
        child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stderr=subprocess.DEVNULL)
        while child.poll() is None and not (tmp_path / STATES / begun).exists():
            time.sleep(0.001)
        child.kill()
        assert child.wait() == -signal.SIGKILL
    run = make_run(tmp_path)
    assert train(run) == curves
    assert tree(run.scratch) == tree(whole.scratch)


@pytest.mark.fault
def test_a_full_disk_is_one_sentence_and_the_run_resumes(finished: tuple[SftRun, Curves], tmp_path: Path) -> None:
    whole, curves = finished
    limited = (
        PROGRAM.replace(
            "train(make_run(",
            "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
            "from rlheals.errors import UserError\ntry:\n    train(make_run(",
        )
        + "except UserError as error:\n    print(error)\n    sys.exit(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", limited, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stdout.count("\n") == 1
    assert "could not be written because" in done.stdout
    run = make_run(tmp_path)
    assert train(run) == curves
    assert tree(run.scratch) == tree(whole.scratch)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_real_families_train_with_accumulation_and_checkpointing(family: str, tmp_path: Path) -> None:
    run = make_run(
        tmp_path, family, steps=3, checkpoints=[3], accumulation=2, gradient_checkpointing=True, schedule="cosine"
    )
    curves = train(run, family)
    assert len(curves.training) == 3
    load_model(tmp_path / RUNGS / "checkpoint-3")


def test_bfloat16_keeps_float32_weights(tmp_path: Path) -> None:
    run = SftRun(**{**vars(make_run(tmp_path, steps=2, checkpoints=[2])), "bfloat16": True})
    curves = train(run)
    state = load_file(tmp_path / RUNGS / "checkpoint-2" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    plain = train(make_run(tmp_path / "plain", steps=2, checkpoints=[2]))
    assert curves != plain
    assert curves.training[0]["loss"] == pytest.approx(plain.training[0]["loss"], rel=0.02)


def test_a_row_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training row 2 has 13 tokens, more than sft.max_length of 11"):
        train(make_run(tmp_path, max_length=11))
    run = make_run(tmp_path)
    with pytest.raises(UserError, match="more than the model's max_position_embeddings of 10"):
        train_sft(make_model("words", run.tokenizer, max_position_embeddings=10), run)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"SFT loss is nan at step \d+; lower sft.learning_rate"):
        train(make_run(tmp_path, learning_rate=1e30, max_grad_norm=1e30))


def test_curves_survive_json(finished: tuple[SftRun, Curves]) -> None:
    _, curves = finished
    assert Curves(**json.loads(json.dumps(vars(curves)))) == curves
