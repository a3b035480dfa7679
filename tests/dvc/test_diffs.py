"""`dvc params|metrics|plots diff` between two settings: readable, and offline to the last byte."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from rlheals.reporting.offline import dvc_page
from tests.browser import draw_offline

REPOSITORY = Path(__file__).parents[2]
# What the repository's dvc.yaml says about metrics and plots.
SNIPPET = """\
metrics:
  - reports/${profile}/metrics.json

plots:
  - Accuracy along the SFT ladder:
      template: ladder
      x:
        reports/${profile}/tables/ladder.csv: step
      y:
        reports/${profile}/tables/ladder.csv: accuracy
      x_label: SFT step (symlog scale)
      y_label: solved at the first try
  - Teacher-forced losses along SFT:
      template: losses
      x:
        reports/${profile}/tables/losses.csv: step
      y:
        reports/${profile}/tables/losses.csv: nll_per_token
      x_label: SFT step (symlog scale)
      y_label: nats per token (log scale)
"""
STAGE = """\
stages:
  report:
    matrix:
      profile: ["${profile}"]
    cmd: PYTHON make_report.py
    params:
      - sft
    outs:
      - reports/${item.profile}:
          cache: false

"""
# Writes the columns of the report's tables, with a peak that moves with the learning rate.
SCRIPT = """\
import json
from pathlib import Path

rate = 2e-3 if "2.0e-3" in Path("params.yaml").read_text() else 1e-3
out = Path("reports/mini")
(out / "tables").mkdir(parents=True, exist_ok=True)
steps = [0, 5, 10, 20, 40, 80, 160, 320]
lines = ["model,seed,run,condition,step,n,accuracy,low,high,format_error_rate"]
for condition, floor in (("ID", 0.9), ("ID, held-out hands", 0.5), ("OOD", 0.1), ("OOD, held-out hands", 0.05)):
    for step in steps:
        value = 0.0 if step == 0 else floor + (0.95 - floor) / (1 + step * rate * 20)
        low, high = max(value - 0.03, 0), min(value + 0.03, 1)
        lines.append(f'tiny,0,tiny/0,"{condition}",{step},1000,{value:.4f},{low:.4f},{high:.4f},0.0')
(out / "tables/ladder.csv").write_text("\\n".join(lines) + "\\n")
lines = ["model,seed,run,series,step,nll_per_token"]
for series, up in (("train (ID)", 0), ("test (ID)", 0.001), ("OOD", 1.0)):
    for step in range(0, 321, 10):
        lines.append(f"tiny,0,tiny/0,{series},{step},{0.24 / (1 + step * rate * 50) + up * step * rate / 2:.5f}")
(out / "tables/losses.csv").write_text("\\n".join(lines) + "\\n")
metrics = {"tiny": {"seed0": {"max_ood_step": 10, "ood_accuracy_end": round(0.1 / rate / 1000, 4)}}}
(out / "metrics.json").write_text(json.dumps(metrics))
"""


def run(folder: Path, *command: str) -> str:
    """Standard output of a command that must succeed, without the user's git and DVC settings."""
    clean = {
        "HOME": str(folder.parent),
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(folder.parent / "site"),
        "DVC_GLOBAL_CONFIG_DIR": str(folder.parent / "global"),
        "DVC_SYSTEM_CONFIG_DIR": str(folder.parent / "system"),
        "GIT_CONFIG_NOSYSTEM": "1",
    } | {f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(command, cwd=folder, env=os.environ | clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dvc(folder: Path, *arguments: str) -> str:
    return run(folder, sys.executable, "-m", "dvc", *arguments)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC project with one committed result and another, of a doubled learning rate, in the workspace."""
    folder = tmp_path_factory.mktemp("diffs") / "project"
    folder.mkdir()
    run(folder, "git", "init", "-q", "-b", "main")
    dvc(folder, "init", "-q")
    dvc(folder, "config", "core.analytics", "false")
    dvc(folder, "config", "plots.html_template", "page.html")
    shutil.copytree(REPOSITORY / ".dvc/plots", folder / ".dvc/plots", dirs_exist_ok=True)
    shutil.copy(REPOSITORY / ".dvc/page.html", folder / ".dvc/page.html")
    (folder / "make_report.py").write_text(SCRIPT)
    (folder / "dvc.yaml").write_text(STAGE.replace("PYTHON", sys.executable) + SNIPPET)
    parameters = folder / "params.yaml"
    parameters.write_text("profile: mini\nsft:\n  learning_rate: 1.0e-3  # peak\n")
    dvc(folder, "repro", "-q")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", "first")
    parameters.write_text(parameters.read_text().replace("1.0e-3", "2.0e-3"))
    dvc(folder, "repro", "-q")
    return folder


@pytest.fixture(scope="module")
def page(project: Path) -> Path:
    """The page that ``dvc plots diff`` writes for the two settings."""
    dvc(project, "plots", "diff", "HEAD", "workspace")
    return project / "dvc_plots/index.html"


def test_params_diff_names_the_one_parameter(project):
    assert json.loads(dvc(project, "params", "diff", "--json")) == {
        "params.yaml": {"sft.learning_rate": {"old": 0.001, "new": 0.002, "diff": 0.001}}
    }


def test_metrics_diff_is_a_short_table(project):
    changes = json.loads(dvc(project, "metrics", "diff", "--json"))["reports/mini/metrics.json"]
    assert list(changes) == ["tiny.seed0.ood_accuracy_end"]
    assert changes["tiny.seed0.ood_accuracy_end"]["diff"] == pytest.approx(-0.05)
    assert "tiny.seed0.ood_accuracy_end" in dvc(project, "metrics", "diff", "--md")


def test_plots_diff_overlays_both_revisions(page):
    text = page.read_text()
    specs = [json.loads(spec) for spec in re.findall(r"var spec = (\{.*?\});\n", text)]
    assert {spec["title"]["text"] for spec in specs} == {
        "Accuracy along the SFT ladder",
        "Teacher-forced losses along SFT",
    }
    for spec in specs:
        assert {row["rev"] for row in spec["data"]["values"]} == {"HEAD", "workspace"}
        assert "<DVC_METRIC" not in json.dumps(spec)


def test_the_page_asks_no_server_for_anything(page):
    text = page.read_text()
    assert not re.findall(r"<script[^>]*\bsrc\s*=", text), "scripts must be inside the page"
    assert not re.findall(r"<link\b", text)
    assert "cdn.jsdelivr.net/npm/vega@" not in text
    assert "window.vegaEmbed" in text


def test_chromium_draws_the_plots_without_a_network(page, tmp_path):
    picture = Path(os.environ.get("RLHEALS_SCREENSHOT", tmp_path / "plots.png"))
    drawn = draw_offline(page, tmp_path / "profile", "--window-size=1000,1500", f"--screenshot={picture}")
    assert drawn.stdout.count("<canvas") + drawn.stdout.count('class="marks"') >= 2, drawn.stderr
    assert picture.stat().st_size > 20_000


def test_repository_holds_the_generated_page_and_this_snippet():
    assert (REPOSITORY / ".dvc/page.html").read_text(encoding="utf-8") == dvc_page(), (
        "run `python -m rlheals.reporting.offline .dvc/page.html`"
    )
    yaml = YAML(typ="safe")
    declared, expected = yaml.load((REPOSITORY / "dvc.yaml").read_text()), yaml.load(SNIPPET)
    assert {key: declared.get(key) for key in expected} == expected
    assert "html_template = page.html" in (REPOSITORY / ".dvc/config").read_text()
