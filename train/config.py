"""The typed configuration: every key with its documentation, and the checks across keys.

Nothing here imports torch, so that a mistake is refused in seconds.
"""

import dataclasses
import difflib
import fnmatch
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.errors import ConfigError


def key(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """Declares one key: its default (a list or dict is empty), its documentation and the values it may take."""
    limits = {"choices": choices, "minimum": minimum, "above": above, "maximum": maximum, "below": below}
    metadata = {"help": help, **limits}
    if isinstance(default, (dict, list)):
        return field(default_factory=type(default), metadata=metadata)
    return field(default=default, metadata=metadata)


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head", "gate")
ATTENTION = ("sdpa", "eager", "windowed", "tiled", "flash_attention_2")
GROUPS = {
    "router": "*.mlp.gate.weight",
    "experts": "*.mlp.experts.*",
    "attention": "*.self_attn.*",
    "norms": "*norm.weight",
}
_OF_LAYER = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
)


QUANTIZED = re.compile(r".*\.(self_attn\.[qkvo]_proj\.weight|mlp\.experts\.(gate_up|down)_proj)")
"""Names of the weights that `lora.quantize` holds in four bits."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where a run writes, and what makes it repeatable."""

    dir: str | None = key(None, "run folder; by default runs/RECIPE-TIME")
    seed: int = key(
        0, "seed of the weights, the order of the data and every random choice", minimum=0, maximum=2**32 - 1
    )
    plots: bool = key(True, "whether plots/ is drawn, at every evaluation and at the end")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The architecture; see `mixtral.MixtralConfig`."""

    init_from: str | None = key(
        None,
        "a folder in the hub's layout, or a hub id (ID@REVISION: of a commit, tag or branch), whose weights, "
        "architecture and tokenizer the run starts from; "
        "of model.* only sliding_window, attention_dropout, attn_implementation and router_* may then differ",
    )
    vocab_size: int = key(32_000, "rows of the embedding and of the head", minimum=8)
    hidden_size: int = key(4096, "width of the model", minimum=1)
    intermediate_size: int = key(14_336, "inner width of one expert", minimum=1)
    num_hidden_layers: int = key(32, "layers", minimum=1)
    num_attention_heads: int = key(32, "query heads", minimum=1)
    num_key_value_heads: int = key(8, "key/value heads, each shared by an equal group of query heads", minimum=1)
    head_dim: int | None = key(None, "width of a head; by default hidden_size / num_attention_heads", minimum=2)
    max_position_embeddings: int = key(131_072, "longest sequence, in tokens", minimum=1)
    rope_theta: float = key(1e6, "base period of the rotary embedding", above=0)
    rms_norm_eps: float = key(1e-5, "epsilon of the norms", above=0)
    initializer_range: float = key(0.02, "standard deviation of the initial weights", above=0)
    tie_word_embeddings: bool = key(False, "whether the head shares the embedding's matrix")
    sliding_window: int | None = key(None, "keys each query sees, itself included; by default all before it", minimum=1)
    attention_dropout: float = key(0.0, "dropout of the attention probabilities", minimum=0, below=1)
    num_local_experts: int = key(8, "experts per layer", minimum=1)
    num_experts_per_tok: int = key(2, "experts each token is routed to", minimum=1)
    router_aux_loss_coef: float = key(0.001, "weight of the load-balancing loss", minimum=0)
    router_jitter_noise: float = key(
        0.0, "uniform noise on what enters router and experts, in training", minimum=0, below=1
    )
    attn_implementation: str = key(
        "sdpa",
        "attention backend: on a CPU in bf16 `tiled` is fastest, on a GPU `flash_attention_2`",
        choices=ATTENTION,
    )


FORMATS = {  # the columns of each; those in brackets may be missing
    "text": ("text",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "[input]", "output"),
    "tokens": ("input_ids", "[labels]"),
    "classification": ("text", "label"),
    "multi_label": ("text", "labels"),
    "regression": ("text", "label"),
}
PROBLEMS = {  # formats that a classifier is trained on, by transformers' names for its problem
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
FIGURES = {  # held-out ones, and the formats that have them; None: those of a language model, with evaluate.prompts
    "loss": (),
    "accuracy": ("classification", "multi_label"),
    "macro_f1": ("classification", "multi_label"),
    "mse": ("regression",),
    "choice_accuracy": None,
    "choice_accuracy_normalised": None,
    "exact_match": None,
}
MESSAGE_KEYS = ("role", "content", "from", "value", "weight")
COLUMNS = [column.strip("[]") for columns in FORMATS.values() for column in columns]


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One of several sources; what it leaves out is as in `data`.

    Attributes:
        path: see `data.path`.
        weight: its share of the documents, relative to the other sources'; given for all sources or for none.
        format: see `data.format`.
        columns: see `data.columns`.
        subset: see `data.subset`.
        split: see `data.split`.
    """

    path: str = "???"
    weight: float | None = None
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    subset: str | None = None
    split: str | None = None


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What is trained on, and how it becomes rows of tokens."""

    path: str | None = key(
        "???",
        "a .txt, .jsonl, .json, .csv or .parquet file, a folder of them, a folder saved by datasets, a dataset on the "
        "hub (ID or ID@REVISION), or python_stdlib: the source and documentation of the running interpreter",
    )
    sources: list[SourceConfig] = key(
        [],
        "several sources in place of data.path: a list of {path, weight, format, columns, subset, split}; weights are "
        "their shares of the documents, without them each is seen once an epoch",
    )
    format: str = key(
        "auto",
        "what a row is; auto: what the columns of a source's first row say, which is never one of the last three: they "
        "train a classifier of texts, by one label, several, or a number",
        choices=("auto", *FORMATS),
    )
    columns: dict[str, str] = key(
        {}, "where columns have other names: {prompt: question, completion: answer}; likewise the keys of messages"
    )
    labels: list[str] = key(
        [],
        "names of a classifier's labels, in the order of their numbers, which rows may hold instead, from 0 on, where "
        "no name is a number itself; by default those that the training data has, sorted, or those of the classifier "
        "in model.init_from; with streaming they are not known unless named",
    )
    text_field: str = key("text", "the column that holds plain text, as data.columns={text: NAME}")
    subset: str | None = key(None, "the hub dataset's configuration")
    split: str = key("train", "the split of a hub dataset or saved dataset dictionary")
    chat_template: str | None = key(
        None,
        "how chats are written: a Jinja file; mixtral: Mixtral-8x7B-Instruct's; none: prompts and answers as they are; "
        "by default the tokenizer's own, or none where it has none",
    )
    train_on: str = key("answers", "which tokens of a chat or prompt are trained", choices=("answers", "all"))
    too_long: str = key(
        "error",
        "what becomes of a sample longer than a row: error; cut: its end is lost; skip. Plain text is never too long",
        choices=("error", "cut", "skip"),
    )
    bad_rows: str = key(
        "error", "what becomes of rows that cannot be trained on: error; skip, and count", choices=("error", "skip")
    )
    tokenizer: str = key(
        "mixtral",
        "mixtral: the real one; train_bpe: one of model.vocab_size tokens from the corpus; or a folder, hub id or "
        "ID@REVISION",
    )
    sequence_length: int = key(4096, "tokens per row", minimum=2)
    packing: bool = key(True, "whether samples share rows, apart from each other; plain text always does")
    packing_window: int = key(20_000, "samples that are packed together, first fit decreasing", minimum=1)
    workers: int = key(
        1, "processes that read and tokenize on each host, besides the tokenizer's own threads", minimum=1
    )
    held_out_path: str | None = key(
        None, "documents to evaluate on, of the form of data.path; by default a share of the data"
    )
    held_out_fraction: float = key(0.01, "share of the documents kept for evaluation", above=0, maximum=0.5)
    held_out_documents: int = key(
        256, "bound on the documents kept for evaluation; with streaming, the first that the share selects", minimum=1
    )
    streaming: bool = key(
        False, "whether documents are read as they are needed; each process reads them all and keeps its rows"
    )
    shuffle: bool = key(True, "whether each epoch has its own order of documents and rows")
    shuffle_buffer: int = key(1000, "with streaming, documents and rows held to draw the next from", minimum=1)

    @property
    def names(self) -> str:
        """The sources, for people."""
        return ", ".join(source.path for source in self.sources) or str(self.path)


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The loop."""

    max_steps: int | None = key(None, "optimizer steps; by default what `train.epochs` comes to", minimum=1)
    epochs: float | None = key(None, "passes over the data, where max_steps is not given; not with streaming", above=0)
    micro_batch_size: int = key(1, "rows per process and forward pass", minimum=1)
    gradient_accumulation_steps: int = key(1, "forward passes per optimizer step", minimum=1)
    precision: str = key(
        "bf16",
        "bf16: weights and activations in bf16, master weights in fp32, and moments by optim.moments; or fp32",
        choices=("bf16", "fp32"),
    )
    router_loss_scope: str = key(
        "global_batch",
        "whose load the router loss balances, per layer: global_batch, of each micro-step over all processes; "
        "previous_step, of the whole step before; document, of each document by itself; huggingface, the published "
        "formula, all layers pooled, per process",
        choices=("global_batch", "previous_step", "document", "huggingface"),
    )
    router_z_loss_coef: float = key(0.0, "weight of the router z-loss", minimum=0)
    router_drift_coef: float = key(
        0.0,
        "weight of the routers' drift: the mean KL divergence of what the routers that the run started with say of "
        "hidden states from what the trained ones say; it holds the routers, not what moves before them",
        minimum=0,
    )
    router_bias_rate: float = key(
        0.0,
        "balancing without a loss: by how much an expert's bias moves against its load after each step; it sways the "
        "choice of experts in training and is bounded so as to be gone at the last step, since a Mixtral has none",
        minimum=0,
    )
    only: str = key(
        "all",
        "which weights are trained: all; or words from router, experts, attention and norms, names, and patterns of "
        "names such as model.layers.3.*, with commas between. A classifier's score.weight always is",
    )
    recompute: str = key(
        "none",
        "what is computed again in backward rather than kept: none; or layers, of each of which only the input is kept "
        "then: less memory for about a third more work",
        choices=("none", "layers"),
    )
    log_every: int = key(10, "steps between logged lines", minimum=1)
    max_skipped_steps: int = key(
        3,
        "a step whose loss or gradient is not finite is skipped by all processes; so many in a row end the run with "
        "code 5; 0 ends it at the first",
        minimum=0,
    )
    spike_zscore: float | None = key(
        10.0,
        "a loss so many deviations above the median of the last 100 steps is a spike, and said; a deviation is 1.4826 "
        "times the median one, and at least 1% of the loss; null looks for none",
        above=0,
    )
    on_spike: str = key(
        "log",
        "log: the step of a spike is taken; skip: it is skipped like one that is not finite; rewind: and the run ends "
        "with code 75, to go on from its last checkpoint without the batches since, as often as max_skipped_steps says",
        choices=("log", "skip", "rewind"),
    )
    check_replicas_every: int | None = key(
        100,
        "steps between comparisons, by a hash, of what several processes hold alike; also made before each save; a "
        "flipped bit ends the run with code 5, naming tensor and process; null makes none",
        minimum=1,
    )
    hang_seconds: float | None = key(
        1800.0,
        "of several processes, how long none of them may get on in training (no forward pass, collective or part of a "
        "file) before they end with code 6 and name the one that hangs; null leaves it to the collectives' 20 days",
        above=0,
    )


SLOWEST_IN_BF16 = 0.99  # a decay by 1 %; one by less than 0.4 % is rounded away
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}  # what an optimizer keeps of each element it updates


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The optimizer."""

    name: str = key("adamw", "adamw, or plain sgd", choices=("adamw", "sgd"))
    lr: float = key(3e-4, "peak learning rate", above=0)
    beta1: float = key(0.9, "decay of the first moment", minimum=0, below=1)
    beta2: float = key(0.95, "decay of the second moment", minimum=0, below=1)
    eps: float = key(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = key(0.1, "decay of matrices, also of experts without a token; norms have none", minimum=0)
    moments: str = key(
        "fp32",
        "what AdamW keeps both moments in: fp32, or bf16, which takes half and needs betas of at most 0.99",
        choices=("fp32", "bf16"),
    )
    max_grad_norm: float | None = key(1.0, "gradients are scaled down to this global norm; null never does", above=0)


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate over the steps."""

    name: str = key("cosine", "shape after warm-up", choices=("cosine", "linear", "constant", "warmup_stable_decay"))
    warmup_steps: int = key(0, "steps of linear warm-up; a run no longer than that never reaches the peak", minimum=0)
    decay_fraction: float = key(
        0.2, "share of the steps over which warmup_stable_decay decays, at the end", above=0, maximum=1
    )
    min_lr_ratio: float = key(0.1, "last learning rate, as a share of the peak", minimum=0, maximum=1)


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How the processes share the work."""

    expert: int = key(
        1, "ranks over which each layer's experts are split; divides the experts and the processes", minimum=1
    )
    zero: int = key(
        0,
        "what DeepSpeed partitions over the processes: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too; "
        "at least 1 where experts are split",
        minimum=0,
        maximum=3,
    )
    dispatch: str = key(
        "dropless",
        "how rows travel to the experts of other ranks: dropless, each once and none lost; or deepspeed_capacity, in "
        "DeepSpeed's own buffers of one size, which drop what does not fit in training",
        choices=("dropless", "deepspeed_capacity"),
    )
    capacity_factor: float | None = key(
        1.25, "with deepspeed_capacity, an expert's buffer over its even share of the rows; null drops none", above=0
    )
    drop_policy: str = key(
        "probs",
        "with deepspeed_capacity, which rows are dropped: those of least probability, or the last in position",
        choices=("probs", "position"),
    )
    overlap_degree: int = key(
        1,
        "with split experts, parts of a layer's tokens: the rows of one travel while those of another are computed; "
        "1 overlaps nothing",
        minimum=1,
    )
    offload_optimizer: bool = key(False, "whether master weights and moments live in host memory; needs parallel.zero")
    offload_parameters: bool = key(False, "whether partitioned weights live in host memory; needs parallel.zero=3")
    persistent_elements: int = key(
        100_000, "with parallel.zero=3, weights of fewer elements stay whole on every process", minimum=0
    )
    meeting_seconds: float = key(
        60.0, "how long the processes wait for one another at the start; more where hosts start unevenly", above=0
    )


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters on frozen weights; the routers' are frozen, unless they are a target."""

    rank: int = key(0, "rank of the adapters; 0 trains the weights themselves", minimum=0)
    alpha: float = key(32.0, "what an adapter adds is scaled by alpha / rank", above=0)
    dropout: float = key(0.0, "share of its inputs that an adapter does not see, in training", minimum=0, below=1)
    rslora: bool = key(False, "whether it is alpha / sqrt(rank) instead")
    dora: bool = key(False, "whether adapted layers have magnitudes of their own; not for gate or the experts")
    targets: str = key(
        "q_proj,k_proj,v_proj,o_proj",
        "what is adapted besides the experts: words from q_proj, k_proj, v_proj, o_proj, lm_head and gate, the router, "
        "with commas between; or empty",
    )
    experts: bool = key(True, "whether each expert has adapters of its own")
    format: str = key(
        "portable",
        "how adapters are exported: portable, a pair per matrix as the hub names them; or fused, as PEFT 0.21 adapts "
        "stacked parameters",
        choices=("portable", "fused"),
    )
    quantize: str = key(
        "none",
        "how the frozen weights of attention and experts are held: none, in train.precision; nf4, in 4 bits, by "
        "bitsandbytes. The adapter still belongs to the weights as they were",
        choices=("none", "nf4"),
    )
    init_from: str | None = key(
        None,
        "a folder with an adapter in either format, its hub id or ID@REVISION, to go on from, with the tokenizer "
        "beside it; of lora.* only dropout, format and quantize may then differ",
    )


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Evaluation on held-out documents: before the first step, now and then, and at the end."""

    every: int | None = key(
        None, "steps between evaluations; by default only before the first step and at the end", minimum=1
    )
    micro_batch_size: int | None = key(
        None, "rows per process and forward pass; by default train.micro_batch_size", minimum=1
    )
    prompts: str | None = key(
        None,
        "a file of prompts that evaluations answer: rows {prompt, choices, answer}, the right one's number from 0 on, "
        "or {prompt, answer}, to be written; a prompt is a text or a list of messages",
    )
    answer_tokens: int = key(32, "bound on a written answer, in tokens", minimum=1)
    compare: list[str] = key(
        [], "the verb evaluate: folders or hub ids of models, or folders of adapters, that are evaluated side by side"
    )
    router_drift_tokens: int = key(
        16_384,
        "with model.init_from, held-out tokens whose routing is compared with that of the model the run started from, "
        "in whole rows; 0 compares none",
        minimum=0,
    )
    router_agreement_alarm: float | None = key(
        0.5,
        "an alarm is raised when a smaller share of these tokens' choices of experts, in any layer, are those they "
        "were; null raises none",
        above=0,
        maximum=1,
    )
    metric: str = key(
        "loss",
        "the held-out figure by which evaluations are compared; of loss and mse less is better, of the others more",
        choices=(*FIGURES,),
    )
    patience: int | None = key(
        None, "a run stops after so many evaluations in a row without a better metric; null never does", minimum=1
    )
    export_best: bool = key(
        False, "whether the model of the best evaluation after the first step is exported, in place of the last"
    )
    sample_prompt: str = key("", "what the text generated at the end begins with")
    sample_tokens: int = key(64, "tokens generated at the end; 0 generates none", minimum=0)


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """The verb `generate`, which writes text."""

    prompt: str | None = key(None, "a text that is gone on from; what follows is shown as it comes")
    prompts: str | None = key(
        None,
        "a file of prompts instead: rows {prompt}, a text or a list of messages, which the chat template writes; what "
        "else is in a row goes into its result",
    )
    output: str | None = key(
        None, "a file for the results, as lines of JSON; by default those of a file go to standard output"
    )
    chat: bool = key(False, "whether a prompt that is a text is the message of a user, which the chat template writes")
    max_new_tokens: int = key(256, "bound on what is written for a prompt, in tokens", minimum=1)
    temperature: float = key(
        0.7, "the logits are divided by it; 0 takes the likeliest token, whatever top_k and top_p say", minimum=0
    )
    top_k: int | None = key(None, "so many of the likeliest tokens may be drawn; null: any", minimum=1)
    top_p: float = key(
        1.0, "the likeliest tokens that have this share of the probability may be drawn", above=0, maximum=1
    )
    batch_size: int = key(8, "prompts per process and forward pass", minimum=1)


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """What is saved of a run, so that it goes on after any death."""

    every: int | None = key(
        1000, "steps between checkpoints; one is also written at the end and on SIGTERM; null writes none", minimum=1
    )
    resume: str = key(
        "auto",
        "auto: a run that died goes on from its newest whole checkpoint; never; or a checkpoint's folder to go on from",
    )
    asynchronous: bool = key(
        False, "whether files are written beside the steps that follow, from a copy in host memory; else the run waits"
    )
    keep_last: int = key(2, "newest checkpoints that are kept", minimum=1)
    keep_every: int | None = key(None, "checkpoints at multiples of so many steps are kept as well", minimum=1)


@dataclass(kw_only=True, slots=True)
class VerifyConfig:
    """The verb `verify`, which compares a layout with one process."""

    full: bool = key(False, "whether verify keeps the model's own sizes; else it shrinks them to seconds' work")


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """The verb `plan`, which computes memory and time of a run before there is a machine; and the check at a start."""

    gpu: str = key("h100-80g", "the device: a name in conf/hardware.yaml; or cpu, as plan.calibrate measured this one")
    gpus: int = key(8, "how many of them, one process each", minimum=1)
    per_host: int | None = key(None, "devices of a host; by default as such hosts are usually sold", minimum=1)
    interconnect: float | None = key(
        None, "GB/s that one device sends to other hosts; by default its share of such a host's network", above=0
    )
    search: bool = key(False, "whether to look for the best layouts, and for the fewest devices that do")
    load_from: str | None = key(
        None, "folder of a run of as many experts, whose expert_load says how unequal the load is; else plan.skew does"
    )
    skew: float = key(
        1.3,
        "rows that the rank with the most of them takes, over an even share, at the 99th percentile of the steps; at "
        "the median it is assumed to exceed 1 by a third of that",
        minimum=1,
    )
    calibrate: bool = key(False, "whether to measure this machine first, for plan.gpu=cpu; written to calibration.json")
    calibration: str | None = key(None, "with plan.gpu=cpu, a calibration.json that plan.calibrate=true wrote before")
    check: bool = key(
        True, "whether a run whose layout cannot fit the memory it is started on ends at once, with code 2"
    )


@dataclass(kw_only=True, slots=True)
class TrackerConfig:
    """Where figures go besides metrics.jsonl."""

    name: str = key("wandb", "tracker", choices=("wandb", "tensorboard", "none"))
    mode: str = key(
        "offline", "W&B: offline writes into the run folder; online also sends", choices=("offline", "online")
    )
    project: str = key("cierzo", "W&B project")


@dataclass(kw_only=True, slots=True)
class Config:
    """The whole configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


@dataclass(frozen=True)
class Key:
    """One key of the configuration, as the documentation and the checks see it."""

    name: str
    type: Any
    default: Any
    help: str
    choices: tuple[str, ...]
    minimum: float | None
    above: float | None
    maximum: float | None
    below: float | None

    @property
    def allowed(self) -> str:
        """The values it may take, in words."""
        if self.choices:
            return " | ".join(self.choices)
        parts = [_type_name(self.type)]
        bounds = ((">=", self.minimum), (">", self.above), ("<=", self.maximum), ("<", self.below))
        parts += [f"{sign} {bound:g}" for sign, bound in bounds if bound is not None]
        return " and ".join([" ".join(parts[:2]), *parts[2:]])

    def check(self, value: Any) -> None:
        """Refuses a value outside the choices or bounds.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """
        if value is None:
            return
        outside = (
            (self.choices and value not in self.choices)
            or (self.minimum is not None and value < self.minimum)
            or (self.above is not None and value <= self.above)
            or (self.maximum is not None and value > self.maximum)
            or (self.below is not None and value >= self.below)
            or (isinstance(value, float) and not math.isfinite(value))
        )
        if outside:
            hint = nearest(value, self.choices) if isinstance(value, str) else ""
            raise ConfigError(f"{self.name}={value}: expected {self.allowed}{hint}")


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, types.UnionType):
        return " or ".join("null" if part is type(None) else part.__name__ for part in typing.get_args(annotation))
    return annotation.__name__


def keys() -> Iterator[Key]:
    """Yields every key, in the order of the sections."""
    for section in dataclasses.fields(Config):
        section_type = typing.cast(type, section.type)
        for item in dataclasses.fields(section_type):
            yield Key(f"{section.name}.{item.name}", item.type, item.default, **item.metadata)


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Returns "; did you mean X?" for the candidate most like a word, or nothing."""
    candidates = list(candidates)
    match = [name for name in candidates if name.rpartition(".")[2] == word.rpartition(".")[2]]  # in another section
    if not match:
        begun = [name for name in candidates if name.startswith(word)]
        match = begun if len(begun) == 1 else difflib.get_close_matches(word, candidates, n=1, cutoff=0.65)
    return f"; did you mean {match[0]}?" if match else ""


def check(config: Config) -> None:
    """Checks every value, then what values say of each other.

    Raises:
        ConfigError: for the first that cannot be used.
    """
    for item in keys():
        section, name = item.name.split(".")
        item.check(getattr(getattr(config, section), name))
    _check_model(config.model)
    _check_data(config.data)
    _check_optim(config.optim)
    _check_parallel(config)
    _check_run(config)
    _check_best(config)
    _check_generate(config.generate)
    _check_trained(config)


def _refuse(when: bool, message: str) -> None:
    if when:
        raise ConfigError(message)


def _check_model(model: ModelConfig) -> None:
    _refuse(
        model.head_dim is None and model.hidden_size % model.num_attention_heads != 0,
        f"model.hidden_size={model.hidden_size} is not a multiple of "
        f"model.num_attention_heads={model.num_attention_heads}; change one of them, or give model.head_dim",
    )
    _refuse(
        model.num_attention_heads % model.num_key_value_heads != 0,
        f"model.num_attention_heads={model.num_attention_heads} is not a multiple of "
        f"model.num_key_value_heads={model.num_key_value_heads}",
    )
    _refuse(
        model.num_experts_per_tok > model.num_local_experts,
        f"model.num_experts_per_tok={model.num_experts_per_tok} is more than "
        f"model.num_local_experts={model.num_local_experts}",
    )
    head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    _refuse(
        head_dim % 2 != 0,
        f"a head of {head_dim} dimensions cannot be rotated: model.head_dim, or model.hidden_size / "
        "model.num_attention_heads, must be even",
    )
    _refuse(
        model.attn_implementation == "windowed" and (model.sliding_window is None or model.attention_dropout > 0),
        "model.attn_implementation=windowed needs a model.sliding_window, and model.attention_dropout=0",
    )
    _refuse(
        model.attn_implementation == "tiled" and model.attention_dropout > 0,
        "model.attn_implementation=tiled needs model.attention_dropout=0",
    )


def _check_data(data: DataConfig) -> None:
    sources = data.sources
    _refuse(data.path is None and not sources, "data.path and data.sources are both empty: give one of them")
    known = (*COLUMNS, *MESSAGE_KEYS)
    for where, columns in [("data", data.columns), *((f"data.sources: {item.path}", item.columns) for item in sources)]:
        for name in columns:
            _refuse(name not in known, f"{where}: no format has a column {name}{nearest(name, known)}")
    formats = ("auto", *FORMATS)
    for item in sources:
        found = f"data.sources: {item.path}"
        _refuse(
            item.format is not None and item.format not in formats,
            f"{found}: format={item.format}: expected {' | '.join(formats)}{nearest(str(item.format), formats)}",
        )
        _refuse(
            item.weight is not None and not 0 < item.weight < math.inf, f"{found}: weight={item.weight} is not above 0"
        )
    _refuse(
        len({item.weight is None for item in sources}) > 1,
        "data.sources: some have a weight and some have none: give all of them one, or none",
    )
    _check_labels(data)
    template = data.chat_template
    _refuse(
        template not in (None, "mixtral", "none") and not Path(template or "").expanduser().is_file(),
        f"data.chat_template={template}: no such file, and neither mixtral nor none",
    )


def _check_labels(data: DataConfig) -> None:
    for item in data.sources:
        _refuse(
            item.format not in (None, data.format) and not PROBLEMS.keys().isdisjoint((data.format, item.format)),
            f"data.sources: {item.path}: format={item.format}, but data.format={data.format}: labelled sources are all "
            "of one format, which data.format names",
        )
    if data.format not in PROBLEMS:
        named = "label" in data.columns or any("label" in item.columns for item in data.sources)
        _refuse(
            bool(data.labels) or named,
            f"labels are of no effect with data.format={data.format}: set it to {' | '.join(PROBLEMS)}",
        )
        return
    _refuse(
        bool(data.labels) and data.format == "regression",
        "data.labels names classes, and data.format=regression has none",
    )
    twice = [name for name in data.labels if data.labels.count(name) > 1]
    _refuse(bool(twice), f"data.labels: {twice[0] if twice else ''!r} is there twice")
    _refuse(
        data.format == "classification" and len(data.labels) == 1, f"data.labels={data.labels}: one label tells nothing"
    )


def may_round(optim: OptimConfig) -> bool:
    """Whether there are moments that could be kept in bf16."""
    return bool(MOMENTS[optim.name]) and max(optim.beta1, optim.beta2) <= SLOWEST_IN_BF16


def _check_optim(optim: OptimConfig) -> None:
    if optim.moments == "fp32":
        return
    _refuse(not MOMENTS[optim.name], f"optim.moments={optim.moments}: optim.name={optim.name} keeps none; leave it out")
    for name in ("beta1", "beta2"):
        beta = getattr(optim, name)
        _refuse(
            beta > SLOWEST_IN_BF16,
            f"optim.{name}={beta} is too slow for moments that bf16 rounds after each update: with optim.moments=bf16 "
            f"set optim.{name}={SLOWEST_IN_BF16} or less besides",
        )


def _check_parallel(config: Config) -> None:
    model, parallel = config.model, config.parallel
    fits = [ranks for ranks in range(1, model.num_local_experts + 1) if model.num_local_experts % ranks == 0]
    _refuse(
        parallel.expert not in fits,
        f"parallel.expert={parallel.expert} does not divide model.num_local_experts={model.num_local_experts}: "
        f"expected one of {', '.join(map(str, fits))}",
    )
    _refuse(
        parallel.expert > 1 and parallel.zero == 0,
        f"parallel.expert={parallel.expert} needs DeepSpeed's engine: set parallel.zero to 1, 2 or 3",
    )
    _refuse(
        parallel.dispatch == "deepspeed_capacity" and (parallel.expert == 1 or parallel.zero == 3),
        f"parallel.dispatch=deepspeed_capacity does not go with parallel.expert={parallel.expert} "
        f"parallel.zero={parallel.zero}: it needs split experts (parallel.expert=2 or more) and parallel.zero=1 or 2",
    )
    _refuse(
        parallel.dispatch == "deepspeed_capacity" and config.train.router_bias_rate > 0,
        "parallel.dispatch=deepspeed_capacity chooses by DeepSpeed's own rule: set train.router_bias_rate=0",
    )
    for name in ("capacity_factor", "drop_policy"):
        value = getattr(parallel, name)
        _refuse(
            parallel.dispatch == "dropless" and value != getattr(ParallelConfig(), name),
            f"parallel.{name}={value} is of no effect: set parallel.dispatch=deepspeed_capacity too",
        )
    _refuse(
        parallel.overlap_degree > 1 and (parallel.expert == 1 or parallel.dispatch == "deepspeed_capacity"),
        f"parallel.overlap_degree={parallel.overlap_degree} is of no effect with parallel.expert={parallel.expert} "
        f"parallel.dispatch={parallel.dispatch}: it needs split experts (parallel.expert=2 or more) and dropless",
    )
    tokens = config.train.micro_batch_size * config.data.sequence_length
    _refuse(
        parallel.overlap_degree > tokens,
        f"parallel.overlap_degree={parallel.overlap_degree}, but a pass has {tokens} tokens: give at most as many",
    )
    _refuse(
        parallel.offload_optimizer and parallel.zero == 0,
        "parallel.offload_optimizer=true needs parallel.zero=1 or more",
    )
    _refuse(parallel.offload_parameters and parallel.zero < 3, "parallel.offload_parameters=true needs parallel.zero=3")


def _check_run(config: Config) -> None:
    model, data, train = config.model, config.data, config.train
    prompts = config.evaluate.prompts
    _refuse(
        prompts is not None and not Path(prompts).expanduser().is_file(), f"evaluate.prompts={prompts}: no such file"
    )
    _refuse(
        prompts is not None and data.format in PROBLEMS,
        f"evaluate.prompts={prompts}: a classifier (data.format={data.format}) answers none",
    )
    _refuse(
        data.sequence_length > model.max_position_embeddings,
        f"data.sequence_length={data.sequence_length} is more than "
        f"model.max_position_embeddings={model.max_position_embeddings}",
    )
    _refuse(
        config.evaluate.sample_tokens >= model.max_position_embeddings,
        f"evaluate.sample_tokens={config.evaluate.sample_tokens} is not less than "
        f"model.max_position_embeddings={model.max_position_embeddings}",
    )
    _refuse(
        train.on_spike == "rewind" and (train.spike_zscore is None or config.checkpoint.every is None),
        "train.on_spike=rewind needs a train.spike_zscore, to see a spike by, and checkpoint.every, to go back to",
    )
    _refuse(
        train.on_spike == "rewind" and train.epochs is not None,
        f"train.on_spike=rewind leaves batches out, which train.epochs={train.epochs} would miss at the end: give "
        "train.max_steps instead",
    )
    _refuse(
        train.max_steps is None and train.epochs is None,
        "train.max_steps and train.epochs are both null: give one of them",
    )
    _refuse(
        train.max_steps is not None and train.epochs is not None,
        "train.max_steps and train.epochs are both given: set one of them to null",
    )
    _refuse(
        data.streaming and train.max_steps is None,
        "data.streaming=true does not know the length of an epoch: give train.max_steps",
    )
    _refuse(
        data.streaming and data.tokenizer == "train_bpe",
        "data.tokenizer=train_bpe reads the whole corpus first: set data.streaming=false or name another tokenizer",
    )
    _refuse(
        model.attn_implementation == "flash_attention_2" and train.precision != "bf16",
        "model.attn_implementation=flash_attention_2 needs half precision: set train.precision=bf16",
    )


def _check_best(config: Config) -> None:
    evaluate, formats = config.evaluate, FIGURES[config.evaluate.metric]
    for name in ("patience", "export_best"):
        _refuse(
            bool(getattr(evaluate, name)) and evaluate.every is None,
            f"evaluate.{name}={getattr(evaluate, name)} compares evaluations: set evaluate.every",
        )
    _refuse(
        formats is None and evaluate.prompts is None,
        f"evaluate.metric={evaluate.metric} is of prompts: set evaluate.prompts",
    )
    _refuse(
        bool(formats) and config.data.format not in (formats or ()),
        f"evaluate.metric={evaluate.metric} is no figure of data.format={config.data.format}",
    )


def _check_generate(generate: GenerateConfig) -> None:
    path, output = generate.prompts, generate.output
    _refuse(
        path is not None and generate.prompt is not None,
        "generate.prompt and generate.prompts are both given: leave one of them out",
    )
    _refuse(path is not None and not Path(path).expanduser().is_file(), f"generate.prompts={path}: no such file")
    _refuse(
        output is not None and not Path(output).expanduser().parent.is_dir(),
        f"generate.output={output}: there is no such folder",
    )


def words_of(text: str) -> tuple[str, ...]:
    """Takes apart what has commas between."""
    return tuple(word for part in text.split(",") if (word := part.strip()))


def _check_trained(config: Config) -> None:
    lora, model = config.lora, config.model
    chosen = trained_names(config)  # which refuses what names nothing
    rest = [name for name in chosen if ".experts." not in name] if lora.rank == 0 else words_of(lora.targets)
    _refuse(
        not rest and config.parallel.expert > 1 and config.parallel.zero == 1 and config.train.precision == "bf16",
        "only the experts are trained, and split, which DeepSpeed's optimizer for bf16 at parallel.zero=1 cannot do: "
        "set parallel.zero to 2 or 3",
    )
    if lora.rank == 0:
        of_adapters = ("dora", "rslora", "dropout", "quantize", "targets", "alpha", "format")
        given = [name for name in of_adapters if getattr(lora, name) != getattr(LoraConfig(), name)]
        given = [f"lora.{name}={getattr(lora, name)}" for name in given]
        _refuse(bool(given), f"{given[0] if given else ''} needs adapters: set lora.rank, or leave it out")
        return
    _refuse(
        lora.quantize == "nf4" and config.parallel.zero == 3,
        "lora.quantize=nf4 does not go with parallel.zero=3, which divides weights of one dtype: set it to 2 or less",
    )
    _refuse(
        lora.quantize == "nf4" and lora.dora,
        "lora.quantize=nf4 does not go with lora.dora=true, whose magnitudes are of weights as they are: leave one out",
    )
    targets = words_of(lora.targets)
    for word in targets:
        _refuse(word not in TARGETS, f"lora.targets: {word!r}, expected {' | '.join(TARGETS)}{nearest(word, TARGETS)}")
    _refuse(
        not targets and not lora.experts, f"lora.rank={lora.rank}, but lora.targets is empty and lora.experts=false"
    )
    _refuse(
        config.train.only != "all",
        f"train.only={config.train.only} with lora.rank={lora.rank}: adapters train beside frozen weights; choose one",
    )
    _refuse(
        "lm_head" in targets and config.data.format in PROBLEMS,
        f"lora.targets: a classifier (data.format={config.data.format}) has no lm_head; its score is always trained",
    )
    _refuse(
        "lm_head" in targets and model.tie_word_embeddings,
        "lora.targets: lm_head shares its matrix with the embedding (model.tie_word_embeddings=true), which an adapter "
        "would change for one of them",
    )
    undecomposed = [
        *(["lora.experts=true"] if lora.experts else []),
        *(["lora.targets=gate"] if "gate" in targets else []),
    ]
    _refuse(
        lora.dora and bool(undecomposed),
        f"lora.dora=true with {' and '.join(undecomposed)}: magnitudes exist for linear layers only",
    )
    _refuse(
        lora.dora and config.parallel.zero == 3,
        "lora.dora=true needs whole weights: set parallel.zero to 2 or less",
    )


def check_training(config: Config) -> None:
    """Refuses what can be verified, but is of no use to train.

    Raises:
        ConfigError: for adapters of weights that nobody else has.
    """
    _refuse(
        config.lora.rank > 0 and config.model.init_from is None,
        f"lora.rank={config.lora.rank} adapts given weights: set model.init_from",
    )
    drift = config.train.router_drift_coef
    _refuse(
        drift > 0 and config.model.init_from is None,
        f"train.router_drift_coef={drift} holds routers to given ones: set model.init_from",
    )
    _refuse(
        drift > 0 and not router_is_trained(config),
        f"train.router_drift_coef={drift} is of no effect on frozen routers: "
        + (f"set lora.targets={config.lora.targets},gate" if config.lora.rank > 0 else "add router to train.only"),
    )
    evaluate = config.evaluate
    for name in ("router_drift_tokens", "router_agreement_alarm"):
        value = getattr(evaluate, name)
        _refuse(
            bool(value) and value != getattr(EvaluateConfig(), name) and not routing_can_move(config),
            f"evaluate.{name}={value} is of no effect: "
            + (
                "set model.init_from"
                if config.model.init_from is None
                else "no weight is trained that routing hangs on"
            ),
        )
    _refuse(
        evaluate.router_drift_tokens == 0
        and evaluate.router_agreement_alarm not in (None, EvaluateConfig().router_agreement_alarm),
        f"evaluate.router_agreement_alarm={evaluate.router_agreement_alarm} is of no effect: set "
        "evaluate.router_drift_tokens above 0",
    )


def check_generation(config: Config, *, can_chat: bool) -> None:
    """Refuses what is no prompt, or cannot go on from one.

    Args:
        config: of the verb.
        can_chat: whether somebody is there to chat with.

    Raises:
        ConfigError: with the keys to set.
    """
    generate, data = config.generate, config.data
    _refuse(
        data.format in PROBLEMS, f"data.format={data.format} is a classifier's, which writes no text: leave the key out"
    )
    _refuse(
        data.tokenizer == "train_bpe",
        "data.tokenizer=train_bpe: a model has a tokenizer already, in its folder: leave the key out",
    )
    output = generate.output
    _refuse(
        output is not None and generate.prompt is None and generate.prompts is None,
        f"generate.output={output} is for what follows a prompt, and a chat goes to the terminal: set generate.prompt "
        "or generate.prompts, or leave it out",
    )
    _refuse(
        not can_chat and generate.prompt is None and generate.prompts is None,
        "there is nothing to go on from: set generate.prompt, or generate.prompts to a file; without them one process "
        "chats on a terminal",
    )
    _refuse(
        output is not None and Path(output).expanduser().exists(),
        f"generate.output={output} exists already: name another file, or move it away",
    )


def routing_can_move(config: Config) -> bool:
    """Whether a run starts from given weights and trains any that a token's routing depends on."""
    lora, last = config.lora, config.model.num_hidden_layers - 1
    if config.model.init_from is None:
        return False
    if lora.rank > 0:
        return bool({*words_of(lora.targets)} - {"lm_head"}) or (lora.experts and last > 0)
    after = (f"model.layers.{last}.mlp.experts.", "model.norm.", "lm_head.", "score.")  # the last router
    return any(not name.startswith(after) for name in trained_names(config))


def router_is_trained(config: Config) -> bool:
    """Whether a run trains any router, or an adapter of it."""
    if config.lora.rank > 0:
        return "gate" in words_of(config.lora.targets)
    return any(name.endswith("mlp.gate.weight") for name in trained_names(config))


def trained_names(config: Config) -> set[str]:
    """Names the weights that `train.only` chooses, adapters aside.

    Raises:
        ConfigError: for a word that chooses none.
    """
    layers = range(config.model.num_hidden_layers)
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    is_classifier = config.data.format in PROBLEMS
    names += [] if config.model.tie_word_embeddings or is_classifier else ["lm_head.weight"]
    names += [f"model.layers.{layer}.{name}" for layer in layers for name in _OF_LAYER]
    chosen: set[str] = {"score.weight"} if is_classifier else set()
    for word in words_of(config.train.only) or ("",):
        found = names if word == "all" else fnmatch.filter(names, GROUPS.get(word, word))
        there_is = sorted({name.replace(".0.", ".*.") for name in names if "layers." not in name or ".0." in name})
        _refuse(
            not found,
            f"train.only: {word!r} chooses no weight; expected {' | '.join(('all', *GROUPS))}, or a pattern of "
            f"{', '.join(there_is)}",
        )
        chosen |= set(found)
    return chosen
