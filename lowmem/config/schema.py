"""The whole configuration: one frozen pydantic section per subject, a sentence under each field.

A field that may be "auto" is filled by `config/defaults.py` (what follows from the data and the
device) or by the planner (what follows from the memory); what a user wrote is never changed.
"""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    field_validator,
    model_validator,
)

from lowmem.config.recompute import checked
from lowmem.units import parse_batch, parse_bytes, parse_count

Auto = Literal["auto"]
StepLaw = Literal["step-law"]
StateFormat = Literal["fp32", "bf16", "8bit"]
WeightFormat = Literal["fp32", "bf16", "int8"]
Ends = Literal["exact", "int8"]
Matmul = Literal["exact", "int8", "fp8"]
UpdateMode = Literal["unfused", "fused+subspace", "fused", "layer-major"]
MOVE_EARLY: tuple[UpdateMode, ...] = ("fused", "layer-major")
"""Modes in which weights change before the whole gradient, and so its norm, is known."""
BoundaryPlace = Literal["keep", "host"]
StatePlace = Literal["device", "host"]
Protocol = Literal["lowmem", "galore"]
Logits = Literal["keep", "recompute"]
SumFormat = Literal["fp32", "bf16", "int8", "host"]
Role = Literal[
    "attention",
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.o",
    "mlp",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
]
Fit = Literal["fit", "fit-fraction", "fit-mlp"]
"""The largest rank that the card holds: one number; one share of every matrix's shorter side; or
twice as much for the MLP as for attention."""

Size = Annotated[int, Field(ge=1, le=10**9)]
"""A number of things in a model or a run; more than 10^9 is a slip."""

Index = Annotated[int, Field(ge=0, le=10**9)]
"""A number of updates that may be none, or the id of a token."""

Count = Annotated[int, Field(ge=1, le=10**18), BeforeValidator(parse_count)]
"""A positive number that may be written "1.1B" or "131k"."""

Recompute = Annotated[str, AfterValidator(checked)]
"""A level, or levels from the last block downwards: see `config/recompute.py`."""

Bytes = Annotated[int, Field(ge=0), BeforeValidator(parse_bytes)]
"""Memory that may be written "300MiB"."""

Rank = Size | Annotated[float, Field(gt=0.0, lt=1.0)]
"""A number of dimensions, or a fraction of a matrix's shorter side."""

CALM = 32
"""Good updates after which an incident is over: no setting, for it only bounds the bookkeeping."""

T = TypeVar("T")


def settled(value: T | Auto | StepLaw) -> T:
    """`value`, which must no longer be a word for a choice: defaults and planner have filled it."""
    if isinstance(value, str) and (value == "auto" or value == "step-law"):
        raise ValueError(f"a setting is still {value!r} after planning")
    return value  # the words have just been excluded


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class RopeScaling(Section):
    """How rotary frequencies are stretched beyond the length they were made for."""

    type: Literal["linear", "llama3"]
    factor: PositiveFloat
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position_embeddings: Size = 8192


class ModelConfig(Section):
    """A LLaMA decoder, in the words of Hugging Face's `LlamaConfig`."""

    hidden_size: Annotated[int, Field(ge=1, le=2**18)]
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=10_000)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    vocab_size: Size = 32000
    max_position_embeddings: Size = 2048
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: PositiveFloat = 0.02
    bos_token_id: Index | None = None
    eos_token_id: Index | None = None
    pad_token_id: Index | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_heads(cls, data: Any) -> Any:
        """Key/value heads and head width follow from the rest where they are not given."""
        if not isinstance(data, dict):
            return data
        filled = {key: value for key, value in data.items() if value is not None}
        heads, hidden = filled.get("num_attention_heads"), filled.get("hidden_size")
        if isinstance(heads, int) and heads > 0:
            filled.setdefault("num_key_value_heads", heads)
            if "head_dim" not in filled and isinstance(hidden, int):
                if hidden % heads:
                    raise ValueError(
                        f"hidden_size {hidden} is no multiple of num_attention_heads {heads}"
                    )
                filled["head_dim"] = hidden // heads
        return filled

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")
        return self

    @property
    def parameters(self) -> int:
        """Number of weights, the tied head counted once."""
        h, f, kv = self.hidden_size, self.intermediate_size, self.key_value_width
        q = self.num_attention_heads * self.head_dim
        attention = 2 * h * q + 2 * h * kv + (q + 2 * kv + h if self.attention_bias else 0)
        mlp = 3 * h * f + (2 * f + h if self.mlp_bias else 0)
        heads = 1 if self.tie_word_embeddings else 2
        block = attention + mlp + 2 * h
        return heads * self.vocab_size * h + self.num_hidden_layers * block + h

    @property
    def key_value_width(self) -> int:
        return self.num_key_value_heads * self.head_dim


class DataConfig(Section):
    """What is read, and as which tokens."""

    protocol: Protocol = Field(
        default="lowmem",
        description="lowmem packs documents and evaluates every token once; galore is that of the "
        "papers: one document per sequence, cut or padded, and a perplexity that is too low",
    )

    source: str = Field(
        default="sample",
        description='"sample", "c4", or a path to text, JSON lines, parquet or shards',
    )
    tokenizer: str = Field(
        default="auto", description="a folder or file that `tokenizers` reads, or a hub name"
    )
    seq_len: Size | Auto = Field(default="auto", description="tokens per sequence")
    text_key: str = Field(
        default="text", description="the key of a JSON line or column that holds text"
    )
    skip_bad: bool = Field(
        default=False, description="count and skip unreadable lines instead of failing"
    )


class RestConfig(Section):
    """Everything that is not projected: embedding, head, norms and biases."""

    method: str = Field(
        default="auto",
        description='a dense method or APOLLO; "auto" is the Adam of the main method',
    )
    states: StateFormat | Auto = Field(default="auto", description="as the main method's when auto")
    options: dict[str, Any] = Field(default_factory=dict, description="its other arguments")


class OptimizerConfig(Section):
    """The method and its settings; keys that are not listed here are the method's own arguments."""

    method: str = Field(default="auto", description="a name of `lowmem methods`")
    lr: NonNegativeFloat | Auto | StepLaw = Field(
        default="auto",
        description="peak learning rate; auto is the method's sheet, step-law arXiv:2503.04715",
    )
    weight_decay: NonNegativeFloat | Auto = Field(
        default="auto", description="decoupled, per unit of lr; auto is the method's sheet, or none"
    )
    rank: Rank | dict[Role, Rank] | Auto | Fit = Field(
        default="auto",
        description="a number, a fraction, a table by role or matrix, or the largest that fits: "
        "fit, fit-fraction, fit-mlp",
    )
    states: StateFormat | Auto = Field(default="auto", description="how moments are stored")
    place: StatePlace | Auto = Field(
        default="auto",
        description="where states live: on the device, or in host memory but for their update",
    )
    rest: RestConfig = Field(default_factory=RestConfig)
    options: dict[str, Any] = Field(
        default_factory=dict, description="other arguments of the method, e.g. gap, scale, betas"
    )

    @model_validator(mode="before")
    @classmethod
    def _collect_options(cls, data: Any) -> Any:
        """`gap = 200` in [optimizer] is short for `options.gap = 200`."""
        if not isinstance(data, dict):
            return data
        own = {key: value for key, value in data.items() if key in cls.model_fields}
        others = {key: value for key, value in data.items() if key not in cls.model_fields}
        given = own.get("options", {})
        if not isinstance(given, dict):
            raise ValueError("options must be a table of the method's arguments")
        options = {**given, **others}
        for key in set(options) & set(cls.model_fields):
            raise ValueError(f"options.{key} is a setting of its own: write optimizer.{key}")
        return own | {"options": options} if options else own


class ScheduleConfig(Section):
    """The learning rate as a function of the update index."""

    kind: Literal["cosine", "linear", "constant", "wsd", "rex"] = "cosine"
    warmup: Index | Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.1, description="updates, or a fraction of all updates"
    )
    min_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.1, description="last learning rate as a fraction of the peak"
    )
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.2, description="wsd: the fraction of all updates in which the rate falls"
    )
    start: Literal["first", "zero"] = Field(
        default="first",
        description="zero: the first update has lr 0, as in the papers' protocol",
    )
    cycle: Index = Field(
        default=0, description="updates after which the schedule begins anew, 0 = never"
    )

    def warmup_updates(self, updates: int) -> int:
        """Warm-up in updates, of a run or cycle of so many; it ends with the run at the latest."""
        if isinstance(self.warmup, float):
            return round(self.warmup * updates)
        return min(self.warmup, updates)


class TrainConfig(Section):
    """The budget of a run and how an update is computed."""

    updates: Size | Auto = Field(default="auto", description="optimizer steps")
    tokens: Count | None = Field(default=None, description="a budget of tokens instead of updates")
    hours: Annotated[float, Field(gt=0.0, le=10.0**6)] | None = Field(
        default=None, description="a budget of time on a known card instead of updates"
    )
    batch: str = Field(default="auto", description="per update: 32seq or 131k-tokens")
    micro_batch: Size | Auto = Field(default="auto", description="sequences per forward pass")
    update: UpdateMode | Auto = Field(
        default="auto", description="where gradients live and accumulate"
    )
    sums: SumFormat | Auto = Field(
        default="auto",
        description="gradients summed over micro-batches as fp32, bf16 or int8, or as fp32 in host "
        "memory; auto is the first that fits",
    )
    boundaries: BoundaryPlace | Auto = Field(
        default="auto",
        description="where the inputs of blocks wait for backward, kept on the device or in host "
        "memory",
    )
    blocks: StatePlace | Auto = Field(
        default="auto",
        description="layer-major: where the weights of blocks live, on the device, or in host "
        "memory but for their use",
    )
    recompute: Auto | Recompute = Field(
        default="auto",
        description="what blocks keep for backward: keep, attn, full, or keep:10,attn:4,full",
    )
    logits: Logits | Auto = Field(
        default="auto",
        description="kept for backward, or made twice; auto is recompute",
    )
    clip: PositiveFloat | Literal["off", "auto"] = Field(
        default="auto", description="gradient norm limit"
    )
    weights: WeightFormat | Auto = Field(
        default="auto",
        description="format of the weights in memory; int8: the matrices of the blocks as codes",
    )
    ends: Ends | Auto = Field(
        default="auto",
        description="embedding and head as floats, or, of int8 weights, as codes too; "
        "auto is exact",
    )
    attention: Literal["sdpa", "flash-attn"] = Field(
        default="sdpa", description="PyTorch's own fused attention, or the flash-attn package"
    )
    compile: bool = Field(
        default=False,
        description="torch.compile the norms, rotations and gated units of every block",
    )
    matmul: Matmul = Field(
        default="exact",
        description="products of the linear layers of blocks, but for the gradients of weights, in "
        "the dtype of the activations, or in int8 or fp8 with a scale per row",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="of weights, data order and rounding"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trial: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="one update of random text before a run begins, to see that it fits; "
        "auto: on a card",
    )

    @field_validator("batch")
    @classmethod
    def _readable_batch(cls, value: str) -> str:
        if value != "auto":
            parse_batch(value)
        return value

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [self.updates != "auto", self.tokens is not None, self.hours is not None]
        if sum(given) > 1:
            raise ValueError("give one of updates, tokens and hours")
        return self


class EvaluateConfig(Section):
    """Validation during the run."""

    every: Index | Auto = Field(default="auto", description="updates between evaluations, 0 = end")
    tokens: Count | Auto = Field(default="auto", description="validation tokens of an evaluation")
    batch: Size = Field(
        default=256, description="galore protocol: sequences whose mean loss counts once"
    )
    gpus: Size = Field(
        default=1, description="galore protocol: how many such batches the papers took at a time"
    )


class CheckpointConfig(Section):
    """When the run is saved."""

    every: Index | Auto = Field(default="auto", description="updates between saves, 0 = end only")
    keep: Size = Field(default=2, description="newest checkpoints to keep")
    keep_best: bool = Field(
        default=False,
        description="save when validation is better than ever, and keep the best",
    )
    keep_every: Index = Field(
        default=0, description="checkpoints of every so many updates stay for good, 0 = none"
    )
    behind: bool = Field(
        default=True,
        description="copy to host memory and write while training goes on; false: wait",
    )


class GuardConfig(Section):
    """What happens to a loss or gradient that is not finite, and to spikes."""

    loss_z: PositiveFloat | Literal["off"] = Field(
        default=10.0,
        description="a loss so many robust deviations above the median of the window is a spike",
    )
    norm_z: PositiveFloat | Literal["off"] = Field(
        default=100.0, description="the same for the gradient norm"
    )
    window: Annotated[int, Field(ge=8, le=10**6)] = Field(
        default=128, description="good updates that are compared with; half of them are needed"
    )
    skips: Index = Field(
        default=3, description="bad updates of one incident that are skipped before a rollback"
    )
    rollbacks: Index = Field(
        default=3, description="rollbacks of one incident before the run ends with exit 6"
    )
    back: Size = Field(
        default=16,
        description="a rollback also steps past so many updates before the first bad one, "
        "the second past twice as many",
    )

    @property
    def reach(self) -> int:
        """How many updates before the newest a rollback may have to begin; 0: there are none."""
        return self.back * self.rollbacks + CALM * (self.skips + 1) if self.rollbacks else 0


class RunConfig(Section):
    """Where the run's folder stands."""

    name: str | None = Field(default=None, description="default: model, method and a number")
    recipe: str | None = Field(
        default=None, description="the recipe that the run began with; set by lowmem"
    )
    out: str = Field(default="runs", description="folder that holds the runs")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        if value is not None and (value in ("", ".", "..") or set(value) & set("/\\\0")):
            raise ValueError(f"{value!r} is no folder name; use letters, digits, dots and dashes")
        return value


class Config(Section):
    """Everything a run depends on."""

    recipe: str | None = Field(
        default=None,
        description="published settings that all others override: lowmem reproduce list",
    )
    model: str | ModelConfig = Field(
        default="auto", description="a preset, a path to a config.json, or an inline table"
    )
    gpu: str = Field(
        default="auto", description='"24GB", "24GiB", a card such as rtx4090, or "auto"'
    )
    others: Auto | Bytes = Field(
        default="auto",
        description="memory that other programs use on the card, e.g. 0MiB; auto: a desktop's",
    )
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    run: RunConfig = Field(default_factory=RunConfig)
