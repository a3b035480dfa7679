from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlheals import __version__, cli
from rlheals.profile import current_profile

HEAVY = ("torch", "transformers", "polars", "pydantic", "numpy", "prefect", "dvc", "altair", "rich")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of ``rlheals arguments``."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    output = capsys.readouterr()
    code = stopped.value.code
    return (code if isinstance(code, int) else 0), output.out, output.err


def loaded_after(code: str) -> set[str]:
    """Which of the heavy modules a fresh interpreter holds after ``code``."""
    script = f"import sys\n{code}\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(output.stdout.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"rlheals {__version__}\n", "")


@pytest.mark.parametrize("command", [[], ["play"], ["profile"], ["eval"]])
def test_help_gives_the_exit_codes(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert "Exit codes: 0 success, 1 internal error" in " ".join(out.split())


def test_help_lists_every_command_file(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--help")
    names = [path.stem.replace("_", "-") for path in (Path(cli.__file__).parent / "commands").glob("[a-z]*.py")]
    assert names
    for name in names:
        assert f"\n  {name} " in out


def test_commands_import_nothing_heavy() -> None:
    assert loaded_after("import rlheals, rlheals.cli") == set()


@pytest.mark.parametrize("arguments", [["nosuch"], ["play", "--rule", "both"], ["profile", "mini", "--nosuch"]])
def test_usage_errors_exit_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(capsys, *arguments)[0] == 2


def test_user_errors_are_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "profile", "minni")
    assert (code, out) == (2, "")
    assert err == "error: there is no preset 'minni'; did you mean mini?\n"


def test_an_interruption_is_one_line_and_exits_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlheals.profile.write_profile", interrupted)
    code, out, err = run(capsys, "profile", "mini")
    assert (code, out, err) == (130, "", "interrupted; nothing unfinished was written\n")


def test_module_form_is_the_same_command() -> None:
    command = [sys.executable, "-m", "rlheals.profile", "minni"]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (output.returncode, output.stdout) == (2, "")
    assert output.stderr == "error: there is no preset 'minni'; did you mean mini?\n"


def test_profile_writes_keeps_and_lists(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    code, out, _ = run(capsys, "profile", "smoke", "seeds=[3]", "--output", str(path), "--json")
    assert (code, json.loads(out)["written"], current_profile(path)) == (0, True, "smoke")
    written = path.read_text()
    assert "seeds: [3]" in written
    _, out, _ = run(capsys, "profile", "smoke", "--keep", "--output", str(path), "--json")
    assert not json.loads(out)["written"]
    assert path.read_text() == written
    _, out, _ = run(capsys, "profile", "mini", "--keep", "--output", str(path))
    assert f"wrote {path} (profile mini)" in out
    assert "former content" in out
    _, out, _ = run(capsys, "profile", "--list", "--json")
    assert list(json.loads(out)) == ["mini", "mini-confirm", "paper", "smoke"]


def test_a_kept_profile_is_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    run(capsys, "profile", "smoke", "--output", str(path))
    path.write_text(path.read_text() + "modles: [tiny]\n")
    code, out, err = run(capsys, "profile", "smoke", "--keep", "--output", str(path))
    assert (code, out) == (2, "")
    assert err == f"error: {path}: modles is not a known key; did you mean models?\n"
    assert "modles" in path.read_text()


def test_profile_without_a_name_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "profile")
    assert code == 2
    assert "rlheals profile mini" in err


@pytest.mark.parametrize(
    ("formula", "cards", "rule", "verdict"),
    [
        ("8/(3-8/3)", "3 3 8 8", "id", "solved"),
        ("(10+10)*1+4", "A 4 J K", "id", "solved"),
        ("(10+10)*1+4", "A 4 J K", "ood", "wrong_number"),
        ("13+11*1", "A 4 J K", "ood", "unused_number"),
        ("13+11-4+1", "A,4,j,k", "ood", "wrong_value"),
        ("__import__('os')", "A 4 J K", "id", "format"),
        ("", "A 4 J K", "id", "empty"),
    ],
)
def test_play_grades(capsys, formula: str, cards: str, rule: str, verdict: str) -> None:
    code, out, _ = run(capsys, "play", formula, "--cards", cards, "--rule", rule, "--json")
    assert code == 0
    assert json.loads(out)["verdict"] == verdict
    assert json.loads(out)["solved"] == (verdict == "solved")


def test_play_shows_solutions_that_it_accepts(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "play", "--seed", "5", "--rule", "ood", "--solutions", "--json")
    dealt = json.loads(out)
    assert dealt["solutions"]
    assert {"J", "Q", "K"} & set(dealt["cards"]), "an ood hand has a face card"
    for formula in dealt["solutions"]:
        _, out, _ = run(capsys, "play", formula, "--cards", " ".join(dealt["cards"]), "--rule", "ood")
        assert out == "Right.\n"
    _, out, _ = run(capsys, "play", "--cards", "A A A A", "--solutions")
    assert out == "There is no solution: nothing reaches 24.\n"


def test_play_deals_the_same_hand_for_the_same_seed(capsys: pytest.CaptureFixture[str]) -> None:
    one, again, other = (run(capsys, "play", "--seed", seed, "--json")[1] for seed in ("1", "1", "2"))
    assert one == again != other


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cards", "A"], "names 1 cards; give 2 to 6"),
        (["--cards", "A 2 X 4"], "card 'X' has no value"),
        (["--target", "99999"], "reaches 99999"),
    ],
)
def test_play_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    code, _, err = run(capsys, "play", *arguments)
    assert code == 2
    assert expected in err


def test_play_asks_until_right_or_the_end_of_input() -> None:
    command = [sys.executable, "-m", "rlheals.cli", "play", "--cards", "A 4 J K"]
    right = subprocess.run(command, input="1+1\n10+10+4*1\n", capture_output=True, text=True, check=True)
    assert "leaves a number unused" in right.stdout or "uses a number" in right.stdout
    assert right.stdout.rstrip().endswith("Right.")
    assert subprocess.run(command, input="", capture_output=True, text=True, check=False).returncode == 0
