"""The report of a profile: figures, tables, metrics and a static page that needs no network."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from ruamel.yaml import YAML

from rlheals.reporting import metrics, offline, words
from rlheals.reporting.sections import Content, Section, all_sections
from rlheals.reporting.tables import load_study

if TYPE_CHECKING:
    from rlheals.params import Params
    from rlheals.reporting.tables import Study

TEMPLATES = Path(__file__).parent / "templates"
PACKAGES = ("rlheals", "torch", "transformers", "trl", "vllm", "numpy", "scipy", "polars", "altair", "dvc")


def build(params: Params, root: Path, target: Path) -> None:
    """Write the whole report of ``params.profile`` into the existing, empty folder ``target``.

    Raises:
        UserError: tables are missing, stale, corrupted, or of another schema; see `load_study`.
    """
    study = load_study(params, root)
    built = [(section, content) for section in all_sections() if (content := section.build(study)) is not None]
    for name in ("figures", "tables"):
        (target / name).mkdir()
    offline.write_javascript(target / "assets" / "vega.js")
    graphics = {
        name: offline.export(figure.chart, name, target / "figures")
        for _, content in built
        for name, figure in content.figures.items()
    }
    for _, content in built:
        _write_tables(content, target / "tables")
    metrics.write(metrics.collect(content for _, content in built), target / "metrics.json")
    (target / "index.html").write_text(_page(study, built, graphics), encoding="utf-8")


def environment() -> Environment:
    """Jinja with the filters of the report; everything is escaped, and a missing value is an error."""
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_keep_units,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {"percent": words.percent, "points": words.points, "p": words.p_value}
    jinja.globals["interval"] = words.interval
    return jinja


def _keep_units(value: object) -> object:
    """Keep a number and its per cent sign on one line."""
    return value.replace(" %", "\u00a0%") if isinstance(value, str) and not isinstance(value, Markup) else value


def _page(study: Study, built: list[tuple[Section, Content]], graphics: dict[str, str]) -> str:
    jinja = environment()
    sections = [
        {
            "key": section.key,
            "title": section.title,
            "html": Markup(_section_html(jinja, section, content, graphics)),
        }
        for section, content in built
    ]
    return jinja.get_template("index.html.j2").render(
        title=study.params.report.title,
        profile=study.params.profile,
        lead=_lead(study),
        css=Markup((TEMPLATES / "style.css").read_text()),
        sections=sections,
        findings=[finding for _, content in built for finding in content.findings],
        parameters=_parameters(study.params),
        versions=versions(),
    )


def _section_html(jinja: Environment, section: Section, content: Content, graphics: dict[str, str]) -> str:
    def figure(name: str) -> Markup:
        return _figure(name, graphics[name], content.figures[name].caption)

    return jinja.get_template(f"sections/{section.key}.html.j2").render(**content.context, figure=figure)


def _figure(name: str, svg: str, caption: str) -> Markup:
    """A figure with its caption and links to its files."""
    return Markup(
        '<figure id="figure-{name}"><div class="chart">{svg}</div><figcaption>{caption} '
        '<a href="figures/{name}.html">Interactive</a> · <a href="figures/{name}.svg">SVG</a> · '
        '<a href="figures/{name}.png">PNG</a></figcaption></figure>'
    ).format(name=name, svg=Markup(svg), caption=caption)


def _lead(study: Study) -> str:
    """What was run, in one sentence or two."""
    params, answers = study.params, study.answers
    engines = words.listed(sorted(set(answers["engine"])))
    sampling = words.listed(sorted(set(answers["sampling"])))
    models, seeds = words.listed(params.models), words.listed(params.seeds)
    return (
        f"{'Models' if len(params.models) > 1 else 'Model'} {models}, "
        f"{'seeds' if len(params.seeds) > 1 else 'seed'} {seeds}: supervised fine-tuning for {params.sft.steps} steps "
        f"on the training rule, probed at {len(params.sft.checkpoints)} checkpoints in and out of distribution "
        f"({len(answers)} graded answers; engine {engines}, {sampling})."
    )


def _parameters(params: Params) -> str:
    text = StringIO()
    yaml = YAML()
    yaml.default_flow_style = None
    # What the parallel driver reserves changes no number: a change of it must not make another page.
    yaml.dump(params.model_dump(mode="json", exclude={"resources"}, exclude_none=True), text)
    return text.getvalue()


def versions() -> dict[str, str]:
    """Versions of what computed the numbers, as installed where the report was made."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _write_tables(content: Content, folder: Path) -> None:
    for name, table in content.tables.items():
        path = folder / name
        if path.suffix == ".csv":
            table.write_csv(path)
        else:
            table.write_parquet(path, compression="zstd", statistics=False)
