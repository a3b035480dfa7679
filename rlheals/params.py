"""The schema of ``params.yaml`` and the only place that reads it."""

from __future__ import annotations

import difflib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlheals.errors import UserError
from rlheals.inference.engine import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE

PARAMS_FILE = Path("params.yaml")
# Strict, so that true is no number; a strict float still takes the integers that YAML gives for 1 or 5.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Integer = Annotated[int, Field(strict=True)]
Probability = Annotated[Number, Field(ge=0, le=1)]
Nonnegative = Annotated[Number, Field(ge=0)]
Rate = Annotated[Number, Field(gt=0)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
Positive = Annotated[Integer, Field(gt=0)]
Count = Annotated[Integer, Field(ge=0)]
Seed = Annotated[Integer, Field(ge=0, lt=2**32)]
NucleusShare = Annotated[Number, Field(gt=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


def _all_engines_take(temperature: float) -> float:
    """The temperature, where every engine samples at it; see `rlheals.inference.engine.Sampling`."""
    if temperature != 0 and not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise ValueError(f"must be 0, which is greedy, or from {LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g}")
    return temperature


def _can_be_told(stop: str) -> str:
    if "\N{REPLACEMENT CHARACTER}" in stop:
        raise ValueError("holds U+FFFD, which stands for every character that is not finished yet; take it out")
    return stop


Temperature = Annotated[Nonnegative, AfterValidator(_all_engines_take)]
StopString = Annotated[str, Field(min_length=1), AfterValidator(_can_be_told)]


class Block(BaseModel):
    """A params block: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Compute(Block):
    """Where stages run."""

    threads: Positive
    device: Literal["cpu", "cuda", "auto"]


class ResourcesSpec(Block):
    """What the parallel driver reserves for a stage that runs a model; dvc.yaml hands it on as ``meta``."""

    gpus: Count
    memory_gib: Rate
    timeout: Positive
    retries: Count


class Architecture(Block):
    """Shape of a Llama that is pretrained from scratch."""

    hidden_size: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    intermediate_size: Positive
    max_position_embeddings: Positive

    @field_validator("heads", "kv_heads")
    @classmethod
    def _divides(cls, number: int, info: ValidationInfo) -> int:
        whole = "hidden_size" if info.field_name == "heads" else "heads"
        total = info.data.get(whole, number)
        if total % number:
            raise ValueError(f"must divide {whole}, which is {total}")
        return number


class ModelSpec(Block):
    """One entry of ``model``: where the base comes from and how it is spoken to."""

    source: str
    """``pretrain`` (a tiny Llama from scratch) or the path of a Hugging Face model folder."""
    prompt_format: Literal["compact", "paper"]
    dtype: Literal["float32", "bfloat16"]
    architecture: Architecture | None = None

    @model_validator(mode="after")
    def _architecture_matches_source(self) -> ModelSpec:
        if (self.source == "pretrain") != (self.architecture is not None):
            raise ValueError("architecture is needed exactly when source is 'pretrain'")
        return self


class Probe(Block):
    """Probe-set sizes, per condition."""

    select: Positive
    confirm: Positive


class Dataset(Block):
    """Sizes of the tables of the ``dataset`` stage."""

    sft_rows: Positive
    rl_prompts: Positive
    loss_rows: Positive
    probe: Probe


class Base(Block):
    """Pretraining of the tiny base; ignored for models loaded from a folder."""

    steps: Positive
    batch_size: Positive
    learning_rate: Rate
    weight_decay: Nonnegative
    warmup_steps: Count
    decay_fraction: Probability
    state_every: Positive
    mixture: dict[str, Nonnegative]

    @field_validator("mixture")
    @classmethod
    def _shares_sum_to_one(cls, shares: dict[str, float]) -> dict[str, float]:
        total = sum(shares.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares sum to {total:g}, not 1; change them")
        return shares


class Sft(Block):
    """Supervised fine-tuning."""

    steps: Positive
    checkpoints: Annotated[list[Integer], Field(min_length=1)]
    batch_size: Positive
    accumulation: Positive
    learning_rate: Rate
    schedule: Literal["constant", "cosine", "paper_log_warmup"]
    warmup_steps: Count
    weight_decay: Nonnegative
    adam_betas: tuple[Beta, Beta]
    adam_epsilon: Rate
    max_grad_norm: Nonnegative
    gradient_checkpointing: StrictBool
    loss_every: Positive
    state_every: Positive
    ood_loss_target: Literal["same", "paper_mismatched"]
    max_length: Positive

    @field_validator("checkpoints")
    @classmethod
    def _checkpoints_within_training(cls, steps: list[int], info: ValidationInfo) -> list[int]:
        last = info.data.get("steps", max(steps))
        beyond = [step for step in steps if not 0 <= step <= last]
        if beyond:
            raise ValueError(f"the list of checkpoints holds {beyond[0]}, but training has only steps 0 to {last}")
        if steps != sorted(set(steps)):
            raise ValueError("checkpoints must be strictly increasing")
        return steps


class Inference(Block):
    """Generation."""

    engine: str
    """A key of `rlheals.inference.ENGINES`, or the address of a server."""
    batch_size: Positive
    max_context: Annotated[Integer, Field(ge=256)]
    """Longest conversation in tokens; at least what the sentinels of `rlheals.inference.fingerprint` need."""
    max_sequences: Positive
    tensor_parallel: Positive
    memory_fraction: Annotated[Number, Field(gt=0, lt=1)]
    sampling: Literal["explicit", "model"]
    temperature: Temperature
    top_p: NucleusShare
    top_k: Count
    repetition_penalty: Rate
    stop: list[StopString]

    @field_validator("engine")
    @classmethod
    def _engine_is_known(cls, name: str) -> str:
        from rlheals.inference import factory_of, known_engines

        if name == "auto":
            raise ValueError(
                "'auto' is resolved when a profile is written; run `python -m rlheals.profile PROFILE "
                f"inference.engine=auto`, or write one of: {known_engines()}"
            )
        if factory_of(name) is None:
            raise ValueError(f"is {name!r}, which is not a known engine; use one of: {known_engines()}")
        return name


class ProbeSft(Block):
    """Which answers ``probe_sft`` collects."""

    select_attempts: Positive
    confirm_attempts: Positive
    """Attempts allowed on ``confirm`` at the chosen rungs; every other rung gets one."""


class Ppo(Block):
    """The RL branches; their constants are those of ``fidelity`` in ``rlheals/training/ppo/settings.py``."""

    fidelity: Literal["sane", "paper"]
    starts: Annotated[list[Count], Field(min_length=1)]
    arms: Annotated[list[Literal["ppo", "reward_only", "kl_only", "reinforce", "grpo"]], Field(min_length=1)]
    updates: Positive
    episodes: Positive
    attempts: Positive
    checkpoints: Annotated[list[Positive], Field(min_length=1)]
    state_every: Positive
    rollouts: Literal["policy", "vllm"]
    change: dict[str, Any]

    @model_validator(mode="after")
    def _checkpoints_are_reached(self) -> Ppo:
        if self.checkpoints != sorted(set(self.checkpoints)) or self.checkpoints[-1] != self.updates:
            raise ValueError(f"checkpoints must be strictly increasing and end with updates, {self.updates}")
        return self


class ProbeRl(Block):
    """Which answers ``probe_rl`` collects."""

    attempts: Positive
    bootstrap: Positive


class Spectra(Block):
    """Which weights ``spectra`` compares, and how."""

    modules: Annotated[list[str], Field(min_length=1)]
    layers: Annotated[str, Field(pattern=r"^(all|\d+(-\d+)?(,\d+(-\d+)?)*)$")]
    embeddings: StrictBool
    subspaces: Annotated[list[Positive | Annotated[Number, Field(gt=0, le=1)]], Field(min_length=1)]
    nulls: Count
    rl_arm: str
    rl_start: Count
    prompts: Positive
    cache_gib: Rate


class Restore(Block):
    """Which edits ``restore`` tries on the weights of SFT_End, of the RL branch and of the rungs RL starts from."""

    references: Annotated[list[Literal["base", "sft_max_ood"]], Field(min_length=1)]
    layer_blocks: Positive
    heads: Annotated[list[Annotated[Number, Field(gt=0, le=1)]], Field(min_length=1)]
    tails: list[Annotated[Number, Field(gt=0, lt=1)]]
    doses: list[Annotated[Number, Field(gt=0, lt=1)]]
    starts: StrictBool
    official: StrictBool
    screen: Positive
    best: Count
    id_budget: Probability
    control_draws: Positive
    cache_gib: Rate


class Report(Block):
    """The report."""

    title: str


class Params(Block):
    """All of ``params.yaml``."""

    profile: Name
    models: Annotated[list[Name], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    compute: Compute
    resources: ResourcesSpec
    model: dict[str, ModelSpec]
    task: dict[str, Any]
    dataset: Dataset
    base: Base
    sft: Sft
    inference: Inference
    probe_sft: ProbeSft
    ppo: Ppo
    probe_rl: ProbeRl
    spectra: Spectra
    restore: Restore
    report: Report

    @field_validator("models", "seeds")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        twice = [value for place, value in enumerate(values) if value in values[:place]]
        if twice:
            raise ValueError(f"names {twice[0]!r} twice; every run needs a name of its own")
        return values

    @model_validator(mode="after")
    def _models_are_described(self) -> Params:
        unknown = [name for name in self.models if name not in self.model]
        if unknown:
            raise ValueError(f"models names {unknown[0]!r}, which has no block under model")
        return self

    @model_validator(mode="after")
    def _branches_start_at_rungs(self) -> Params:
        missing = [step for step in self.ppo.starts if step not in self.sft.checkpoints]
        if missing:
            raise ValueError(f"ppo.starts holds {missing[0]}, which is not among sft.checkpoints")
        return self

    @model_validator(mode="after")
    def _spectra_name_a_branch(self) -> Params:
        if self.spectra.rl_arm not in self.ppo.arms:
            raise ValueError(f"spectra.rl_arm is {self.spectra.rl_arm!r}, which is not among ppo.arms")
        if self.spectra.rl_start not in self.ppo.starts:
            raise ValueError(f"spectra.rl_start is {self.spectra.rl_start}, which is not among ppo.starts")
        return self

    @cached_property
    def task_spec(self) -> Any:
        """The ``task`` block validated by the schema of the task it names."""
        from rlheals.tasks import task_spec_model

        return task_spec_model(str(self.task.get("name"))).model_validate(self.task)


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and validate a params file.

    Raises:
        UserError: missing or malformed file, an unknown key (the nearest valid key is named), a wrong value.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist here; run `python -m rlheals.profile mini` to write it.")
    try:
        raw = YAML(typ="safe").load(path.read_text())
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of parameter blocks; run `python -m rlheals.profile mini`.")
    return parse_params(raw, path)


def parse_params(raw: dict[str, Any], where: Path = PARAMS_FILE) -> Params:
    """Validate the content of a params file; see `load_params`."""
    try:
        params = Params.model_validate(raw)
        params.task_spec  # noqa: B018  validated here so that a bad task block is told like any other
    except ValidationError as error:
        raise UserError(_sentence(error, where, raw)) from error
    return params


def _sentence(error: ValidationError, where: Path, raw: dict[str, Any]) -> str:
    """One clear sentence for the first problem of a validation error."""
    # A mistyped key is also a missing one; the mistyped one is what the user can see.
    errors = error.errors()
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    location = [str(part) for part in first["loc"]]
    if error.title != "Params":
        location = ["task", *location]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _valid_keys(location[:-1], raw), n=1)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else "remove it."
        return f"{where}: {key} is not a known key; {hint}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing; add it or run `python -m rlheals.profile mini` to write a complete file."
    message = first["msg"].removeprefix("Value error, ")
    return (
        f"{where}: {key or 'top level'}: {message} (got {first['input']!r})."
        if len(str(first["input"])) < 80
        else f"{where}: {key or 'top level'}: {message}."
    )


def _valid_keys(path: list[str], raw: dict[str, Any]) -> list[str]:
    """Valid keys of the block at ``path``."""
    if path[:1] == ["task"]:
        from rlheals.tasks import task_spec_model

        return list(task_spec_model(str(raw["task"].get("name"))).model_fields)
    model: Any = Params
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        if field is not None:  # otherwise part is a name the user chose, and model is its block already
            kinds = (field.annotation, *get_args(field.annotation))
            model = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    return list(getattr(model, "model_fields", {}))
