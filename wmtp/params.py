"""The schema of params.yaml: every key with its range, and its unit or meaning where the name does not tell.

Every stage validates the whole file before it computes; wmtp.view then shows it what it declares.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from wmtp.blocks import reads_pairs
from wmtp.faults import one_line
from wmtp.method_schema import SHARED_ARMS, AnyMethod, ValueLoss
from wmtp.schema import Fraction, Positive, Section


class ParameterError(ValueError):
    """A key or value of params.yaml that is missing, unknown, out of range or not declared by the stage that reads it."""


# Keys that change how a stage runs or is followed, never what it makes; DVC does not track them.
OPERATIONAL = ["tracking", "log_level", "run.checkpoint_every", "evaluation.workers"]


class SyntheticCheckpoint(Section):
    """A small random checkpoint in Meta's own layout, with a tokenizer trained on the micro task."""

    kind: Literal["synthetic"]
    dim: Positive = Field(description="width of the residual stream")
    n_layers: Positive = Field(description="blocks, extra heads included, as Meta counts")
    n_heads: Positive = Field(description="heads of attention in a block; divides dim")
    n_kv_heads: Positive = Field(description="heads of keys and values; divides n_heads")
    vocab_size: Annotated[int, Field(ge=300)] = Field(description="pieces; 256 of them are bytes")
    multiple_of: Positive = Field(description="the feed-forward width is rounded up to a multiple of this")
    n_future_tokens: Positive = Field(description="heads, F")
    corpus_problems: Positive = Field(description="texts that the tokenizer is trained on")


class LocalCheckpoint(Section):
    kind: Literal["local"]
    policy: str = Field(description="folder in Meta's or Hugging Face's layout")
    reference: str = Field(description="folder in Hugging Face's or Meta's layout, same tokenizer")


class HubCheckpoint(Section):
    kind: Literal["huggingface"]
    policy: str = Field(description="repository id on the hub, gated ones with HF_TOKEN set")
    policy_folder: str = Field(description="folder inside that repository; '' for its root")
    reference: str = Field(description="repository id of the reference model")
    revision: str = Field(description="branch, tag or commit of the policy repository")


class SyntheticData(Section):
    """The micro task: see wmtp.synthetic."""

    kind: Literal["synthetic"]
    n_train_compositions: Positive = Field(description="problems with one correct and one incorrect program")
    n_eval_problems: Annotated[int, Field(ge=1, le=500)] = Field(description="problems of each benchmark")
    min_operations: Positive = Field(description="least operations of a composition")
    max_operations: Positive = Field(description="most operations of a composition")
    remark_digits: Annotated[int, Field(ge=0)] = Field(
        description="random digits in a comment above each training program: tokens that no prompt decides and no test needs"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "SyntheticData":
        if self.min_operations > self.max_operations:
            raise ValueError(f"min_operations {self.min_operations} is above max_operations {self.max_operations}")
        return self


class DataFolders(Section):
    codecontests: str | None = Field(description="folder with problems.jsonl.gz and solutions.jsonl.gz")
    functions: str | None = Field(description="folder of function problems with right and wrong programs")
    humaneval: str = Field(description="folder with HumanEval's jsonl")
    mbpp: str = Field(description="folder with MBPP's jsonl")
    codecontests_test: str | None = Field(default=None, description="as codecontests: problems that are evaluated on, not trained on")


class LocalData(Section):
    kind: Literal["local"]
    path: str = Field(description="a folder of real files")
    folders: DataFolders = Field(description="where in it each source lies; null leaves one out")


class HubData(Section):
    kind: Literal["huggingface"]
    codecontests: str = Field(description="data set id; its train part is trained on, its test part a benchmark")
    humaneval: str = Field(description="data set id")
    mbpp: str = Field(description="data set id")
    max_problems: Positive | None = Field(description="CodeContests problems to take; null: all")


class Source(Section):
    checkpoint: Annotated[SyntheticCheckpoint | LocalCheckpoint | HubCheckpoint, Field(discriminator="kind")] = Field(
        description="synthetic | local | huggingface"
    )
    data: Annotated[SyntheticData | LocalData | HubData, Field(discriminator="kind")] = Field(description="synthetic | local | huggingface")


class Micro(Section):
    dim: Positive = Field(description="width of the residual stream, at most the base's")
    n_layers: Positive = Field(description="blocks, extra heads included, at most the base's")
    n_heads: Positive = Field(description="heads of attention in a block; divides dim")
    n_kv_heads: Positive = Field(description="heads of keys and values; divides n_heads")
    vocab_size: Annotated[int, Field(ge=260)] = Field(description="first pieces of the base's tokenizer that are kept")
    multiple_of: Positive = Field(description="the feed-forward width is rounded up to a multiple of this")
    layers: list[int] | None = Field(description="trunk blocks to keep, ascending; null: evenly spread")
    max_megabytes: Annotated[float, Field(gt=0)] = Field(description="10^6 bytes that the bundle may have on disk")


class Splits(Section):
    """Shares of the training problems; a group (round, composition) lies in one split only."""

    warm_up: Fraction = Field(description="share of the problems")
    policy: Fraction = Field(description="share of the problems: what the four methods train on")
    reference: Fraction = Field(description="share of the problems")
    critic: Fraction = Field(description="share of the problems")
    validation: Fraction = Field(description="held out: the critic's gate and the policies' validation loss")

    @model_validator(mode="after")
    def _sums_to_one(self) -> "Splits":
        total = self.warm_up + self.policy + self.reference + self.critic + self.validation
        if abs(total - 1) > 1e-6:
            raise ValueError(f"shares sum to {total:g}, expected 1")
        return self


class Data(Section):
    tokenizer: str = Field(description="bundle whose tokenizer is used")
    template: Literal["evaluation_notes", "alpaca"] = Field(
        description="prompt of a training row; evaluation_notes adds the benchmarks' notes to alpaca's form"
    )
    max_length: Annotated[int, Field(ge=16)] = Field(description="tokens, prompt and response; longer rows are shortened or dropped")
    splits: Splits = Field(description="shares that sum to 1")
    warm_up_difficulty: Positive | None = Field(description="the warm-up sees only problems of at most this difficulty; null: all")
    max_problems: Positive | None = Field(description="at most this many problems in each split")


class Run(Section):
    n_processes: Positive = Field(description="torchrun workers")
    n_threads: Positive = Field(description="CPU threads of each worker")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(description="auto: cuda, else mps, else cpu")
    dtype: Literal["float32", "bfloat16"] = Field(description="of products; trained weights and optimizer moments stay float32")
    parallel: Literal["ddp", "fsdp"] = Field(description="ddp: a copy a process; fsdp: weights, gradients and moments sharded")
    checkpoint_every: Positive = Field(description="optimizer steps between saves for resuming")


class Optimizer(Section):
    betas: tuple[float, float] = Field(strict=False, description="decay of the first and second moment, in [0, 1)")
    eps: Annotated[float, Field(gt=0)] = Field(description="added to the root of the second moment")
    weight_decay: Annotated[float, Field(ge=0)] = Field(description="per step, times the learning rate; matrices only")
    clip_norm: Annotated[float, Field(gt=0)] = Field(description="global L2 norm of the gradient")
    warmup_fraction: Fraction = Field(description="of the steps, linear")
    final_fraction: Fraction = Field(description="of the peak learning rate, at the last step")
    micro_batch_tokens: Positive = Field(description="rows x padded length of one forward, per process")


class Tuning(Section):
    start: str = Field(description="bundle to start from")
    n_epochs: Annotated[float, Field(ge=0)] = Field(description="passes over its split, fractions allowed; 0 skips the tuning")
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(description="peak, of AdamW")
    batch_rows: Positive = Field(description="rows of one optimizer step, over all processes")


class Gate(Section):
    min_delta_std: Annotated[float, Field(ge=0)] = Field(
        description="floor of std(v[i] - v[i-1]) on held-out programs, in values' own unit"
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(description="of the bootstrap interval of the AUC")
    train_anyway: bool = Field(description="train policies although the gate failed")


class Anchor(Section):
    """A slow copy of the critic, an exponential moving average of its weights, which its values are kept near."""

    decay: Annotated[float, Field(gt=0, lt=1)] = Field(description="of the average, an optimizer step")
    coef: Annotated[float, Field(ge=0)] = Field(description="weight of (v - v_average)^2 beside the value loss")
    value_clip: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        description="as in PPO: the loss is no less than that of v clipped to this distance of v_average; null: no clipping"
    )

    @model_validator(mode="after")
    def _holds(self) -> "Anchor":
        if self.coef == 0 and self.value_clip is None:
            raise ValueError("coef is 0 and value_clip null: such an anchor holds nothing; write anchor: null")
        return self


class Regression(ValueLoss):
    anchor: Anchor | None = Field(description="null: none")


class Pairwise(Section):
    """Bradley-Terry on the two programs of a pair: values are logits, of which only differences mean anything."""

    kind: Literal["pairwise"]


class Critic(Tuning):
    loss: Annotated[Regression | Pairwise, Field(discriminator="kind")]
    lm_coef: Annotated[float, Field(ge=0)] = Field(description="weight of the next-token loss on correct programs beside the value loss")
    gate: Gate

    @model_validator(mode="after")
    def _pairs(self) -> "Critic":
        if self.batch_rows % 2:
            raise ValueError(f"batch_rows {self.batch_rows} is odd, expected pairs of one correct and one incorrect row")
        return self


class Policy(Section):
    start: str = Field(description="bundle that every method starts from")


class Lora(Section):
    """Adapters (wmtp.lora): the policy's own weights stay as they are."""

    rank: Positive = Field(description="of the product B A beside each target")
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(description="the product counts alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(description="share of the adapters' inputs that is left out while training")
    targets: list[Literal["wq", "wk", "wv", "wo", "w1", "w2", "w3", "output"]] = Field(
        min_length=1, description="linear layers by Meta's names, in every block, extra heads included"
    )

    @model_validator(mode="after")
    def _named_once(self) -> "Lora":
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets {', '.join(self.targets)}: expected each once")
        return self


class Training(Tuning):
    start: None = Field(default=None, exclude=True)
    seed: Annotated[int, Field(ge=0)] = Field(description="order of the policy's rows, and sampling")
    n_epochs: Annotated[float, Field(gt=0)] = Field(description="passes over the policy split, fractions allowed")
    beta: Annotated[float, Field(gt=0)] = Field(description="temperature of exp(z / beta), for methods that set none of their own")
    log_every: Positive = Field(description="optimizer steps")
    lora: Lora | None = Field(description="null: every weight trains")


class Evaluation(Section):
    benchmarks: list[Literal["humaneval", "mbpp", "codecontests"]] = Field(description="what is sampled and judged, each once")
    humaneval_protocol: str = Field(description="name in wmtp.protocols: prompt, stop strings, cut")
    mbpp_protocol: str = Field(description="name in wmtp.protocols: prompt, stop strings, cut")
    codecontests_protocol: str = Field(description="name in wmtp.protocols: prompt, stop strings, cut")
    max_problems: Positive | None = Field(description="per benchmark; null: all")
    n_samples: Annotated[int, Field(ge=0)] = Field(description="sampled completions a problem, beside one greedy")
    temperature: Annotated[float, Field(gt=0)] = Field(description="of the sampled completions")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(description="least set of tokens with this probability is sampled from; 1: all")
    max_tokens: Positive = Field(description="generated tokens a completion")
    batch_rows: Positive = Field(description="sequences generated side by side, per process")
    draft_rows: Annotated[int, Field(ge=0)] = Field(
        description="batches of at most this many rows are drafted by the extra heads, which costs more a forward and needs fewer; 0: none"
    )
    ks: list[Positive] = Field(description="k of pass@k; those above n_samples are left out")
    workers: Positive = Field(description="judging processes")
    cpu_seconds: Annotated[float, Field(gt=0)] = Field(description="CPU time of one test program")
    wall_seconds: Annotated[float, Field(gt=0)] = Field(description="time on the clock of one test program")
    memory_mb: Positive = Field(description="2^20 bytes of address space of one test program")
    all_tests: bool = Field(description="run the tests behind a program's first failure too, for the share of tests passed")
    accept_weak_sandbox: bool = Field(description="judge programs for data that the project did not make where files cannot be walled off")

    @model_validator(mode="after")
    def _measures_pass_at_1(self) -> "Evaluation":
        if not self.benchmarks or len(set(self.benchmarks)) != len(self.benchmarks):
            raise ValueError(f"benchmarks {self.benchmarks}: expected one at least, each once")
        if self.n_samples > 0 and 1 not in self.ks:
            raise ValueError(f"ks {self.ks} lacks 1: every comparison starts from pass@1")
        return self


class Study(Section):
    arms: list[str] = Field(description="methods that study/dvc.yaml trains, each with every seed")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(description="training seeds; six at least for an exact test to reach p < 0.05")
    n_samples: Annotated[int, Field(ge=1)] = Field(description="sampled completions a problem, beside one greedy")

    @model_validator(mode="after")
    def _compares(self) -> "Study":
        for key, values, least in (("arms", self.arms, 2), ("seeds", self.seeds, 2)):
            if len(set(values)) != len(values) or len(values) < least:
                raise ValueError(f"{key} {values}: expected {least} at least, each once")
        if "baseline" not in self.arms:
            raise ValueError(f"arms {self.arms}: expected baseline among them, with which all others are compared")
        return self


class Report(Section):
    method: str = Field(description="whose metrics become metrics/selected.json")
    bootstrap: Annotated[int, Field(ge=100)] = Field(description="resamples of a paired interval")


class Tracking(Section):
    enabled: bool = Field(description="log to MLflow; off or unreachable never changes a result")
    tags: dict[str, str] = Field(description="of the parent run")


class Params(Section):
    seed: Annotated[int, Field(ge=0)] = Field(description="everything upstream of the policies")
    source: Source
    micro: Micro
    data: Data
    run: Run
    optimizer: Optimizer
    warm_up: Tuning
    reference: Tuning
    critic: Critic
    policy: Policy
    training: Training
    methods: dict[str, AnyMethod]
    evaluation: Evaluation
    report: Report
    study: Study
    tracking: Tracking
    log_level: Literal["quiet", "info", "debug"] = Field(description="of the progress lines on stderr; debug shows tracebacks")

    @model_validator(mode="after")
    def _report_names_a_method(self) -> "Params":
        if self.report.method not in self.methods:
            raise ValueError(f"report.method {self.report.method!r} is none of methods: {', '.join(self.methods)}")
        return self

    @model_validator(mode="after")
    def _data_has_the_benchmarks(self) -> "Params":
        data = self.source.data
        if "codecontests" in self.evaluation.benchmarks and data.kind == "local" and data.folders.codecontests_test is None:
            raise ValueError(
                "evaluation.benchmarks: codecontests, but source.data.folders.codecontests_test is null; name its folder, or take it out"
            )
        return self

    @model_validator(mode="after")
    def _whole_pairs(self) -> "Params":
        for name, block in self.methods.items():
            idle = name in SHARED_ARMS and name not in self.study.arms
            if self.training.batch_rows % 2 and reads_pairs(block) and not idle:
                raise ValueError(
                    f"training.batch_rows {self.training.batch_rows} is odd, but methods.{name} trains on pairs of one correct and one"
                    " incorrect row (its critic or policy_on_incorrect); make it even"
                )
        return self

    @model_validator(mode="after")
    def _study_names_methods(self) -> "Params":
        for arm in self.study.arms:
            if arm not in self.methods:
                raise ValueError(
                    f"study.arms: {arm!r} is none of methods: {', '.join(self.methods)}; correct its spelling or add methods.{arm}"
                )
            if "-" in arm:
                raise ValueError(f"study.arms: {arm!r} has a hyphen, which parts arm and seed in the names of the study; rename its block")
        return self


def validate(values: dict[str, Any], where: str = "params.yaml") -> Params:
    """The whole file against the schema; the first fault becomes one line that says what, where, expected and found."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ParameterError(one_line(error, values, Params, where)) from None


def loader(base: type) -> type:
    """PyYAML's `base`, and as a number also 1e-05: DVC writes small numbers in this form of Python's when it sets them by -S."""
    made = type("Loader", (base,), {"yaml_implicit_resolvers": {at: list(pairs) for at, pairs in base.yaml_implicit_resolvers.items()}})
    made.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?e[-+]\d{2,}$"), list("-+0123456789"))
    return made


# In C where libyaml is there: a tenth of the time, and every process of every stage reads two files.
_Loader = loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def parse_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParameterError(f"{path}: no such file; run from the root of the repository") from None
    except yaml.YAMLError as error:
        raise ParameterError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ParameterError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    return values
