"""The forms that a block of `methods` in params.yaml can have: one for each weighting, or for each kind of it that has keys of its own."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from wmtp.schema import Fraction, Positive, Section

KeepFraction = Annotated[float, Field(gt=0, le=1, description="share of a sequence's tokens that train")]
Gamma = Annotated[float, Field(gt=0, le=1, description="discount a token of the advantage; 1: none")]
Lam = Annotated[
    Fraction | Literal["length_adaptive"],
    Field(description="of GAE, 0: one value's difference, 1: all that follow; length_adaptive: max(0, 1 - 1 / (0.05 tokens)), by row"),
]
LowClip = Annotated[float, Field(ge=0, lt=1, description="least weight, in units of the mean weight")]
HighClip = Annotated[float, Field(gt=1, description="greatest weight, in units of the mean weight")]
HeadMode = Annotated[
    Literal["shared_target", "per_head", "per_head_zscore", "pooled"], Field(description="whose excess decides: see wmtp.weighting.excess")
]


class Lagged(Section):
    """Judged by the step before: the first step alone is scored twice."""

    kind: Literal["lagged"]
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="statistics <- ema * statistics + (1 - ema) * the last step's; 0: the last step's alone"
    )


Scope = Annotated[
    Annotated[Literal["sequence", "two_pass"], Tag("scored")] | Annotated[Lagged, Tag("lagged")],
    Discriminator(
        lambda value: "lagged" if isinstance(value, dict | Lagged) else "scored" if value in ("sequence", "two_pass") else None,
        custom_error_type="scope",
        custom_error_message="Input should be sequence, two_pass or {kind: lagged, ema: 0.0}",
    ),
    Field(
        description="population of the weights: sequence, each row; two_pass, the whole step, by a forward without gradients first;"
        " lagged, the whole step before"
    ),
]


class Method(Section):
    n_future: Positive = Field(description="heads trained, F")
    mix: Fraction = Field(description="w <- 1 + mix * (w - 1); 0 is uniform")
    head_weights: list[Annotated[float, Field(ge=0)]] | None = Field(
        description="one factor a head on its loss, head 0 first, divided by their mean; null: equal"
    )

    @model_validator(mode="after")
    def _one_weight_a_head(self) -> "Method":
        if self.head_weights is not None and (len(self.head_weights) != self.n_future or sum(self.head_weights) == 0):
            raise ValueError(f"head_weights {self.head_weights}: expected n_future = {self.n_future} numbers, not all 0")
        return self


class UniformMethod(Method):
    weighting: Literal["uniform"]


class ValueLoss(Section):
    """Every state's value against its return."""

    kind: Literal["bce", "mse", "huber"]
    gamma: Annotated[float, Field(gt=0, le=1, description="discount a token of the return")]
    lam: Fraction = Field(description="of GAE: 1, returns; below, partly the values of later states")


class SharedMethod(Method):
    """A policy with a value head on its own trunk, which learns from pairs of a correct and an incorrect program."""

    critic: Literal["shared"] = Field(description="values of the same forward; nothing cached")
    value_coef: Annotated[float, Field(gt=0)] = Field(description="weight of the value loss, a mean over the step's rows")
    value_loss: ValueLoss = Field(description="as critic.loss, without its anchor")
    policy_on_incorrect: Literal["value_only", "weighted"] = Field(
        description="value_only: incorrect programs train the value alone; weighted: the policy too, weighed as the correct ones"
    )


SHARED_ARMS = ("verifiable_shared", "uniform_shared")
"""Blocks that nothing trains unless study.arms names them: the method, and its control on the same rows."""


class SharedUniformMethod(SharedMethod):
    weighting: Literal["uniform"]


class Exponential(Section):
    """From advantages to weights."""

    beta: Annotated[float, Field(gt=0)] | None = Field(description="temperature of exp(z / beta); null: training.beta")
    gamma: Gamma
    lam: Lam
    sigma_floor: Annotated[float, Field(gt=0)] = Field(description="least standard deviation that an advantage is divided by")
    z_clip: Annotated[float, Field(gt=0)] = Field(description="greatest |z|, in standard deviations of the advantage")
    weight_clip_min: LowClip
    weight_clip_max: HighClip
    terminal_credit: bool = Field(description="pay R - v at the last token too; a critic that knows nothing then weighs it most")


class SharedAdvantageMethod(SharedMethod, Exponential):
    """Weights from the values of the same forward, each row a population."""

    weighting: Literal["advantage"]


class AdvantageMethod(Method, Exponential):
    """The critic's weights, and the controls that go through the same pipeline."""

    weighting: Literal["advantage", "shuffled", "constant_critic", "random_matched"]
    critic: Literal["separate"] = Field(description="a network of its own, whose values are cached")
    policy_on_incorrect: Literal["value_only", "weighted"] = Field(
        description="value_only: correct programs alone; weighted: pairs of a correct and an incorrect one, weighed alike"
    )
    concentration_floor: Fraction = Field(description="least exp(entropy) / N of the weights; below it beta is raised")


class PositiveAdvantageMethod(Method):
    """1[A > 0] on pairs of a correct and an incorrect program."""

    weighting: Literal["advantage", "shuffled"]
    critic: Literal["separate"] = Field(description="a network of its own, whose values are cached")
    policy_on_incorrect: Literal["binary"] = Field(description="pairs of a correct and an incorrect program, both weighed 1[A > 0]")
    gamma: Gamma
    lam: Lam
    terminal_credit: bool = Field(description="pay R - v at the last token too")


class PositionOnlyMethod(AdvantageMethod):
    weighting: Literal["position_only"]
    n_bins: Positive = Field(description="equal parts of a response over which the critic's weights are averaged")


class OracleMethod(Method):
    weighting: Literal["oracle"]
    policy_on_incorrect: Literal["value_only", "weighted"] = Field(
        description="value_only: correct programs alone; weighted: pairs with an incorrect one, whose fault gets the least weight"
    )
    emphasis: Annotated[float, Field(gt=0)] = Field(
        description="weight of a correct program's decisive token in units of another's, before the projection"
    )
    weight_clip_min: LowClip
    weight_clip_max: HighClip


class BinaryMethod(Method):
    weighting: Literal["crr_binary"]
    gamma: Gamma
    lam: Lam


class RandomBudgetMethod(Method):
    weighting: Literal["random_k"]
    keep_fraction: KeepFraction


class OwnBudgetMethod(Method):
    """Selections by the policy's own loss or entropy."""

    weighting: Literal["loss_topk", "entropy_topk"]
    scope: Scope
    keep_fraction: KeepFraction


class InvertedMethod(Method):
    weighting: Literal["inverted_k"]
    head_mode: HeadMode
    scope: Scope
    keep_fraction: KeepFraction


class DynamicMethod(Method):
    weighting: Literal["dft"]
    scope: Scope


class FocalMethod(Method):
    weighting: Literal["focal"]
    scope: Scope
    focusing: Annotated[float, Field(ge=0)] = Field(description="exponent g of (1 - p)^g")


class HeadDecayMethod(Method):
    weighting: Literal["head_decay"]
    decay: Annotated[float, Field(gt=0, le=1)] = Field(description="weight of a head in units of the head before it")


class BoundaryMethod(Method):
    weighting: Literal["adamtp_mask"]
    boundary_fraction: Annotated[float, Field(gt=0, le=1)] = Field(description="share of a sequence's tokens that are boundaries")


class ExcessMethod(Method):
    """Rho-1; the default selection."""

    weighting: Literal["excess"]
    selection: Literal["topk", "absolute"]
    head_mode: HeadMode
    scope: Scope
    keep_fraction: KeepFraction


class TokenSkipExcess(Method):
    weighting: Literal["excess"]
    selection: Literal["tokenskip"]
    head_mode: HeadMode
    scope: Scope
    drop_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(description="share of a sequence's tokens that do not train")


class WeightedExcess(Method):
    weighting: Literal["excess"]
    selection: Literal["weighted"]
    head_mode: HeadMode
    scope: Scope
    temperature: Annotated[float, Field(gt=0)] = Field(description="nats of excess, softmax over tokens")


class EmphasisExcess(Method):
    weighting: Literal["excess"]
    selection: Literal["percentile_emphasis"]
    head_mode: HeadMode
    scope: Scope
    percentile: Fraction = Field(description="share of a sequence's tokens that get no emphasis")
    alpha: Annotated[float, Field(gt=0)] = Field(description="nats of excess that every token has beside its emphasis")


class SoftmaxOverHeadsExcess(Method):
    weighting: Literal["excess"]
    selection: Literal["softmax_over_heads"]
    temperature: Annotated[float, Field(gt=0)] = Field(description="nats of excess, softmax over a token's heads")


AnyExcess = Annotated[
    ExcessMethod | TokenSkipExcess | WeightedExcess | EmphasisExcess | SoftmaxOverHeadsExcess, Field(discriminator="selection")
]
SeparateAdvantage = Annotated[AdvantageMethod | PositiveAdvantageMethod, Field(discriminator="policy_on_incorrect")]
AnyAdvantage = Annotated[SeparateAdvantage | SharedAdvantageMethod, Field(discriminator="critic")]


def _with_critic(block: Any) -> str:
    return "shared" if "critic" in (block if isinstance(block, dict) else type(block).model_fields) else "none"


AnyUniform = Annotated[Annotated[UniformMethod, Tag("none")] | Annotated[SharedUniformMethod, Tag("shared")], Discriminator(_with_critic)]
AnyMethod = Annotated[
    AnyUniform
    | AnyAdvantage
    | PositionOnlyMethod
    | OracleMethod
    | BinaryMethod
    | RandomBudgetMethod
    | OwnBudgetMethod
    | InvertedMethod
    | DynamicMethod
    | FocalMethod
    | HeadDecayMethod
    | BoundaryMethod
    | AnyExcess,
    Field(discriminator="weighting"),
]
