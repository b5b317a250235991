"""The schema of a run: every key that `train.py` and the tools in `scripts/` accept.

One dataclass a section; the string under a field says what it means, its unit, and the value that turns it off.
docs/configuration.md is made of this file (`configs.reference`).
Hydra composes the YAML tree in this folder onto these dataclasses (`configs.compose`), so an unknown key or a value of
the wrong type is an error that names the key. Defaults live here and nowhere else; the YAML files are differences.
`training.validate` checks what concerns several keys, all problems at once, before anything is built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Attention(StrEnum):
    """Implementations behind the attention seam (`model.attention`)."""

    auto = "auto"
    flash = "flash"
    flash1 = "flash1"
    sdpa = "sdpa"
    cudnn = "cudnn"
    standard = "standard"


class Position(StrEnum):
    """How a model knows the order of its tokens."""

    learned = "learned"
    rope = "rope"
    alibi = "alibi"
    none = "none"


class Norm(StrEnum):
    """Normalisation before each sub-layer and before the head."""

    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class Activation(StrEnum):
    """Non-linearity of the MLP; `swiglu` is gated and has a third matrix."""

    gelu_tanh = "gelu_tanh"
    gelu = "gelu"
    relu2 = "relu2"
    swiglu = "swiglu"


class Source(StrEnum):
    """Where the documents come from."""

    stdlib = "stdlib"
    hub = "hub"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    mixture = "mixture"
    """Those that `data.mixture` lists."""


class Packing(StrEnum):
    """How documents become samples of `model.sequence_length` tokens."""

    concatenate = "concatenate"
    best_fit = "best_fit"


class Schedule(StrEnum):
    """Shape of the learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"
    constant = "constant"


class Precision(StrEnum):
    """Arithmetic of the forward and backward pass. `auto`: bf16 on a GPU that has it, fp16 on an older one,
    fp32 on a CPU."""

    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Fp8(StrEnum):
    """How the blocks' linear layers scale what they multiply in 8-bit floating point (`engine.fp8`)."""

    none = "none"
    tensorwise = "tensorwise"
    rowwise = "rowwise"


class Recompute(StrEnum):
    """Activation checkpointing: nothing, or whole blocks, recomputed in the backward pass."""

    none = "none"
    block = "block"


class NonFinite(StrEnum):
    """What a NaN or infinite loss or gradient does."""

    stop = "stop"
    skip = "skip"


class WandbMode(StrEnum):
    """`auto`: online with a key and a network, else offline, without a prompt."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Device(StrEnum):
    """`auto`: CUDA if there is a GPU, else the CPU."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class Toggle(StrEnum):
    """A switch that can decide by itself."""

    auto = "auto"
    on = "on"
    off = "off"


@dataclass
class ModelConfig:
    """The transformer. The defaults are GPT-2's choices; `model=llama` switches to the modern ones."""

    num_layers: int = 12
    """Transformer blocks."""
    num_heads: int = 12
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads (grouped-query attention). None: as many as query heads. Must divide
    `num_heads`."""
    width: int = 768
    """Width of the residual stream, E."""
    head_dim: int | None = None
    """Width of one head, D. None: width / num_heads."""
    mlp_width: int | None = None
    """Hidden width of the MLP. None: 4 × width; for swiglu 8/3 × width, rounded up to a multiple of 128."""
    sequence_length: int = 1024
    """Tokens a sample, S: the longest context the model is trained on."""
    vocab_size: int | None = None
    """Tokens of the vocabulary. None: taken from the tokenizer of the prepared data."""
    vocab_multiple: int = 128
    """The embedding is padded to a multiple of this; padding is never predicted. 1: no padding."""
    position: Position = Position.learned
    """Position information."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies; only with `position=rope`."""
    norm: Norm = Norm.layernorm
    """Kind of normalisation."""
    norm_eps: float = 1e-5
    """Added to the variance before its root."""
    activation: Activation = Activation.gelu_tanh
    """Non-linearity of the MLP."""
    bias: bool = True
    """Biases in the linear layers and, with layernorm, in the norms."""
    tied_embeddings: bool = True
    """The head shares the embedding's matrix."""
    qk_norm: bool = False
    """RMS-normalise queries and keys of each head before their product."""
    attention: Attention = Attention.auto
    """Implementation of attention. auto: flash on CUDA, sdpa on a CPU."""
    window: int | None = None
    """Sliding window: a token sees itself and this many tokens before it. None: all before it."""
    attention_softcap: float = 0.0
    """Scores become c·tanh(score/c). 0: off."""
    logit_softcap: float = 0.0
    """Logits become c·tanh(logit/c). 0: off."""
    dropout: float = 0.0
    """Probability of dropout on embeddings, attention weights, and both residual branches. 0: off."""
    z_loss: float = 0.0
    """Weight of log(Z)², Z the softmax's normaliser, in the loss (PaLM, section 5). 0: off."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; projections into the residual stream get std /
    sqrt(2·num_layers)."""
    fused: Toggle = Toggle.auto
    """Our Triton kernel for the softmax of the loss. auto: on CUDA. off: PyTorch operations, as on a CPU."""
    fused_norms: Toggle = Toggle.auto
    """Our Triton kernels for the norms with the residual sums around them, which with `engine.fuse_weight_gradients`
    also sum the gradients of the biases before them. auto: on CUDA. off: PyTorch operations, which `engine.compile`
    fuses in part."""


@dataclass
class MixtureSource:
    """One source of a mixture, by keys that the `data` section must not have beside it; the rest of that section holds
    for all sources."""

    name: str = ""
    """Its name in metrics (`val/loss/NAME`): lower-case letters, digits, `_` and `-`. Has to be given."""
    weight: float = 1.0
    """Its share of the training tokens, relative to the other sources' weights."""
    source: Source = Source.stdlib
    """As `data.source`."""
    path: str | None = None
    """As `data.path`."""
    subset: str | None = None
    """As `data.subset`."""
    revision: str | None = None
    """As `data.revision`."""
    split: str = "train"
    """As `data.split`."""
    validation_split: str | None = None
    """As `data.validation_split`."""
    text_key: str = "text"
    """As `data.text_key`."""


@dataclass
class DataConfig:
    """Corpus, tokenizer, shards and loader."""

    source: Source = Source.stdlib
    """Kind of source. `stdlib`: the Python standard library's own sources, always there."""
    path: str | None = None
    """For text, jsonl and parquet: a file, a folder or a glob. For hub: the dataset's name (`owner/name`)."""
    subset: str | None = None
    """hub: the dataset's configuration. None: its only or default one."""
    revision: str | None = None
    """hub: commit, tag or branch, so that a run can be repeated. None: the newest."""
    split: str = "train"
    """hub: the split to train on."""
    validation_split: str | None = None
    """hub: the split to validate on. None: hold out `validation_fraction` of the documents."""
    validation_fraction: float = 0.02
    """Share of documents held out, chosen by a hash of their text, so that it doesn't depend on their
    order."""
    text_key: str = "text"
    """Column or field that holds the text."""
    max_documents: int | None = None
    """Read only so many documents (of each source of a mixture), empty ones included. None: all."""
    mixture: list[MixtureSource] = field(default_factory=list)
    """Sources to mix by weight, each validated apart; they share one tokenizer. Empty: the one source named above,
    which `data.source=mixture` (`data=mixture`) doesn't allow."""
    tokenizer: str = "train"
    """`train`: train a byte-level BPE on this corpus; else a `tokenizer.json` file or folder, or a hub name
    such as `gpt2`."""
    tokenizer_vocab_size: int = 4096
    """Vocabulary of a tokenizer trained here, special tokens included; at least 257."""
    cache_dir: str = ".cache/data"
    """Folder of prepared corpora and trained tokenizers."""
    shard_tokens: int = 100_000_000
    """Tokens a shard file at most."""
    num_workers: int = 0
    """Processes that tokenise. 0: one a CPU, of a container with a limit as many as that."""
    shuffle: bool = True
    """Shuffle the samples of each epoch. False: in corpus order."""
    packing: Packing = Packing.concatenate
    """concatenate: end to end, cut every `model.sequence_length` tokens. best_fit: only longer documents are cut, and
    what no document fills of a sample is padding that doesn't count; it is computed at each start, 32 bytes a
    document."""
    document_mask: bool = False
    """Tokens see only their own document (`cu_seqlens` to the kernels). False: packed documents see each
    other."""
    prefetch: int = 4
    """Global batches that the loader's thread keeps ready. 0: load on the training thread."""


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 6e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak."""
    schedule: Schedule = Schedule.cosine
    """Shape after the warm-up."""
    warmup_steps: int = 100
    """Steps of linear warm-up. 0: none."""
    decay_steps: int | None = None
    """Steps of the final decay. None: all steps after the warm-up; for wsd a fifth of all steps."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay, on matrices and embeddings only. 0: off."""
    grad_clip: float = 1.0
    """Largest norm of the global gradient. 0: off."""
    fused_step: Toggle = Toggle.auto
    """Our Triton kernel that clips, updates, rounds the weights and empties the gradients' sums in one pass. auto: on
    CUDA at stage 0, and in bf16 at stages 1 to 3 (`engine.lean_zero2`, `lean_zero3`) with `engine.fp32_accumulation`
    and without offload. off: PyTorch's AdamW, and the rest apart. With it, but not in fp16, the device decides whether
    to step too: the host doesn't wait for the loss and the norm, and logs them when the next step is queued."""


@dataclass
class TrainConfig:
    """How long, in what batches, and what happens every so often."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    global_batch_size: int | None = None
    """Sequences an optimizer step, over all ranks. Any two of the three batch keys decide the third; where only
    this one or the micro-batch is given, there is no accumulation."""
    micro_batch_size: int | None = None
    """Sequences a forward pass on one rank. None: global batch / (ranks × accumulation)."""
    accumulation_steps: int | None = None
    """Micro-batches an optimizer step on one rank. None: global batch / (ranks × micro batch)."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 250
    """Steps between evaluations; there is one at the end as well. 0: never."""
    eval_sequences: int = 256
    """Sequences an evaluation reads, always the same ones. 0: the whole validation split."""
    sample_tokens: int = 0
    """Tokens of the text sampled at each evaluation. 0: off."""
    sample_prompt: str = "\n"
    """What the sampled text begins with."""
    save_every: int = 500
    """Steps between checkpoints; there is one at the end as well. 0: none, also not at the end or on a signal."""
    keep_last: int = 2
    """Newest checkpoints that are kept, of the steps that led to here. 0: all."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for good. 0: off."""
    async_save: bool = True
    """Write checkpoints while training goes on, from a copy in CPU memory (12 bytes a parameter, shared among the
    ranks). False: training waits for the disk."""
    watchdog_minutes: float = 30.0
    """A run without a finished step for so long writes the stacks of all ranks into run.log and ends with exit code 70.
    Time in which it is stopped, as by SLURM's suspend, doesn't count. 0: off."""
    nonfinite: NonFinite = NonFinite.stop
    """A NaN or infinite loss or gradient stops the run, or skips that step's update. Where the device decides whether
    to step (`optim.fused_step`) the run stops once the next step is queued, and before anything is saved."""
    profile_steps: int = 0
    """Profile this many steps, some time after the tenth (in a shorter run: its last ones), and write where their time
    goes into the run folder: waterfall.json and .png, of several ranks ranks.png. 0: off."""


@dataclass
class EngineConfig:
    """DeepSpeed sharding and precision (`engine=zero0|zero1|zero2|zero3|zero3_offload`)."""

    zero_stage: int = 1
    """0: replicate, 1: shard optimizer states, 2: gradients as well, 3: parameters as well."""
    precision: Precision = Precision.auto
    """Arithmetic. bf16 and fp16 keep fp32 master weights."""
    fp8: Fp8 = Fp8.none
    """Products of the blocks' linear layers in 8-bit floating point, forward and for the inputs' gradients; needs bf16,
    and on a GPU compute capability 8.9. tensorwise: one scale a tensor, gradients in e5m2. rowwise: one a row, all in
    e4m3, more exact. It changes what is trained: compare losses. none: off."""
    fp32_accumulation: bool = True
    """Sum gradients of micro-batches in fp32. False: in the model's dtype (less memory, less exact)."""
    loss_scale: float = 0.0
    """fp16: a fixed loss scale. 0: dynamic."""
    offload_optimizer: bool = False
    """Keep optimizer states in CPU memory; stages 1 to 3."""
    offload_params: bool = False
    """Keep parameters in CPU memory; stage 3."""
    bucket_size: int = 50_000_000
    """Elements a communication bucket at stages 1 to 3: smaller ones overlap more and take less memory, larger ones
    wait less. 50 M in fp32 travel in 0.6 ms between two H200, whose latency is 16 µs."""
    overlap_comm: bool = True
    """Overlap gradient communication with the backward pass at stages 1 to 3."""
    sequence_parallel_size: int = 1
    """Neighbouring ranks that share the tokens of each sample, exchanging heads around attention (DeepSpeed-Ulysses),
    for sequences whose activations don't fit one device. Must divide the ranks, `model.sequence_length` and
    `model.num_heads`. 1: off."""
    recompute: Recompute = Recompute.none
    """Activation checkpointing."""
    compile: Toggle = Toggle.auto
    """`torch.compile` of each block. auto: on CUDA."""
    fuse_weight_gradients: Toggle = Toggle.auto
    """Add weight gradients to the fp32 sums over micro-batches inside the products that make them, unrounded. auto: in
    bf16 at stages 0 and 1, on one rank also at 2 with lean_zero2 and 3 with lean_zero3; with fp32_accumulation and
    without offload. on: also on several ranks at stage 2 with copy_engines, where products write them, rounded, where
    the other ranks read them, and those of norms and biases are summed in fp32. off: round them to bf16, copy them and
    add them apart."""
    lean_zero2: Toggle = Toggle.auto
    """At stage 2, sum gradients and step by our own code instead of DeepSpeed's, which copies more and on several ranks
    sends twice the bytes: each gradient to all. auto: with fp32_accumulation and without offload. off: DeepSpeed's."""
    lean_zero3: Toggle = Toggle.auto
    """At stage 3, sum gradients and step by our own code instead of DeepSpeed's, which copies and waits more. auto:
    with fp32_accumulation and without offload. off: DeepSpeed's."""
    gather_in_place: bool = False
    """At stage 3 on several ranks, gather each parameter to where it is used, by a message of its own. false: a block's
    in one message, from which each is copied (4 bytes an element in bf16, and 4 / ranks before). Not with
    `copy_engines`, which always does."""
    copy_engines: Toggle = Toggle.auto
    """At stages 2 and 3 on several GPUs of one host, move gradients, and at stage 3 weights, by the GPUs' copy engines,
    from each other's memory, instead of NCCL's kernels, which take multiprocessors from the products beside them. auto:
    in half precision with lean_zero2 or lean_zero3, where GPUs can read each other's memory. off: NCCL."""
    timeout_minutes: float = 10.0
    """A collective that takes longer than this fails."""


@dataclass
class HardwareConfig:
    """The machine."""

    device: Device = Device.auto
    """Device to train on."""
    peak_tflops: float | None = None
    """Dense peak of one device at the run's precision, TFLOP/s. None: from the table of known devices, else
    measured."""
    tf32: bool = True
    """fp32 matrix products may use TF32 tensor cores (never in `deterministic` runs)."""


@dataclass
class LoggingConfig:
    """wandb, progress and plots."""

    wandb: WandbMode = WandbMode.auto
    """wandb's mode. disabled: off."""
    project: str = "flashtrain"
    """wandb project."""
    entity: str | None = None
    """wandb entity. None: the key's default."""
    group: str | None = None
    """wandb group. None: none."""
    tags: list[str] = field(default_factory=list)
    """wandb tags."""
    wandb_timeout_s: float = 8.0
    """Seconds to wait for wandb's server before the run goes on offline."""
    progress: Toggle = Toggle.auto
    """Live progress bar. auto: on a terminal; else a line every `train.log_every` steps."""
    plot: bool = True
    """Write `curves.png` at each evaluation and at the end."""


@dataclass
class RunConfig:
    """A whole run."""

    name: str = "quickstart"
    """Name of the run; its folder is `runs/<name>/`."""
    run_dir: str | None = None
    """Folder of the run. None: `runs/<name>`."""
    seed: int = 1337
    """Seed of initialisation, data order and dropout."""
    deterministic: bool = False
    """Only algorithms whose results can be repeated bit for bit; slower on a GPU."""
    resume: str = "auto"
    """auto: go on from the newest valid checkpoint of the run folder, if any. never: start anew, moving what
    is there aside.
    Else the path of a checkpoint, or of a run folder, to go on from. The last two hold for a first start: when torchrun
    or SLURM starts the run again, it goes on from its own."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass
class CompareConfig:
    """`scripts/compare_attention.py`."""

    attention: list[Attention] = field(
        default_factory=lambda: [Attention.standard, Attention.flash1, Attention.sdpa, Attention.flash]
    )
    """Implementations to train with, one after the other. Speed-ups are relative to `standard`, else to the first."""
    steps: int = 30
    """Optimizer steps each; the first third is warm-up and not measured."""
    paper: bool = False
    """Compare at the four settings of the FlashAttention-2 paper's table 1 instead of one experiment (`--paper`)."""
    settings: list[str] = field(default_factory=list)
    """For `paper`: which of gpt3_1b3_2k, gpt3_1b3_8k, gpt3_2b7_2k and gpt3_2b7_8k. Empty: all."""


@dataclass
class CompareRunConfig(RunConfig):
    """A run, and what to compare in it."""

    compare: CompareConfig = field(default_factory=CompareConfig)


@dataclass
class ScalingConfig:
    """`scripts/scaling.py`."""

    world_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Numbers of processes on this host; the first is what efficiencies are relative to. Not empty."""
    engines: list[str] = field(default_factory=lambda: ["zero1"])
    """Options of `engine=` to measure. Not empty."""
    steps: int = 30
    """Optimizer steps each; the first third is warm-up and not measured."""
    strong: bool = False
    """Keep the global batch (strong scaling). False: keep the batch of a rank (weak scaling)."""
    each_card: bool = True
    """Run the trial of one process on as many GPUs as the largest of `world_sizes` at the same time, each by itself:
    its row is of the median GPU, and efficiencies are given over the slowest one, too. False: on the first GPU alone.
    On a CPU there is one trial in any case."""
    forecast: list[int] = field(default_factory=list)
    """Larger numbers of processes to predict, not run: nodes like this host, of as many processes as the largest trial.
    Needs a trial on one process. Empty: none."""
    network_gb_per_s: float | None = None
    """For `forecast`: 10^9 bytes/s that each process sends to another node while it receives as much. None: as fast
    as inside this host."""


@dataclass
class ScalingRunConfig(RunConfig):
    """A run, and over how many processes to scale it."""

    scaling: ScalingConfig = field(default_factory=ScalingConfig)


@dataclass
class ForecastConfig:
    """`scripts/forecast.py`: a cluster on paper. Rates are to be measured; the defaults of links are a datasheet's."""

    tokens_per_s: float = 0.0
    """Of one device alone with this config's micro-batch, as measured. 0: not known, only memory is predicted."""
    memory_gb: float | None = None
    """10^9 bytes of a device's memory (an H100 80GB: 85, an H200: 150), to say what fits. null: nothing is said."""
    world_sizes: list[int] = field(default_factory=lambda: [8, 64, 256, 1024])
    """Numbers of devices."""
    engines: list[str] = field(default_factory=lambda: ["zero1", "zero2", "zero3"])
    """Options of `engine=` to predict."""
    node_size: int = 8
    """Devices that the faster links join."""
    link_gb_per_s: float = 450.0
    """10^9 bytes/s that a device sends inside a node while it receives as much. Default: NVLink of an H100."""
    network_gb_per_s: float = 50.0
    """The same between nodes, for each device. Default: a 400 Gbit/s card each."""
    latency_us: float = 5.0
    """Microseconds for a message to pass one link."""
    vocab_size: int = 50304
    """Vocabulary where `model.vocab_size` is null: it is the tokenizer's, and no data is read here."""
    strong: bool = False
    """Keep the global batch (strong scaling). False: it grows with the devices (weak scaling)."""


@dataclass
class ForecastRunConfig(RunConfig):
    """A run, and the devices to imagine it on."""

    forecast: ForecastConfig = field(default_factory=ForecastConfig)
