"""What must hold between keys: found before anything is built, reported together, each problem with its remedy.

A problem of one room is stated by that room (`model.check`, `training.batch.resolve_batch`); this file asks them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from configs.errors import UserError
from configs.schema import Attention, DataConfig, Device, Precision, RunConfig, Schedule, Source
from data.mixture import EMPTY, check_mixture
from model import resolve_attention
from model.checks import check
from model.sequence import problems as sequence_problems
from training.backend import (
    DTYPES,
    check_engine,
    check_fp8,
    may_have_peers,
    resolve_precision,
    should_be_lean,
    should_fuse_step,
    should_fuse_weight_gradients,
)
from training.batch import data_ranks, resolve_batch
from training.resume import resume_path
from training.run import run_folder


def validate(config: RunConfig, world_size: int) -> None:
    """Raise one `UserError` that lists every problem of `config` on `world_size` ranks."""
    problems = list(find_problems(config, world_size))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"The config has {count}:\n" + "\n".join(f"  - {problem}" for problem in problems))


def find_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    """Every problem as a sentence that names the dotted key, what was given, and the remedy."""
    yield from _numbers(config)
    yield from check(config.model, config.data.document_mask)
    yield from _data(config)
    yield from _optim(config)
    yield from _engine(config)
    yield from _device(config, world_size)
    try:
        resume_path(config, run_folder(config))
    except UserError as error:
        yield str(error)
    yield from _ranks(config, world_size)


def _ranks(config: RunConfig, world_size: int) -> Iterator[str]:
    """How samples, and with sequence parallelism the tokens of a sample, are shared among the ranks."""
    size = config.engine.sequence_parallel_size
    if size < 1:
        return  # said with the other numbers
    if not check(config.model):
        yield from sequence_problems(config.model, size)
    try:
        resolve_batch(config.train, data_ranks(config.engine, world_size))
    except UserError as error:
        yield str(error)


def _numbers(config: RunConfig) -> Iterator[str]:
    """Ranges of single numbers."""
    train, data, optim = config.train, config.data, config.optim
    at_least: dict[str, tuple[float, int]] = {
        "train.steps": (train.steps, 1),
        "train.log_every": (train.log_every, 1),
        "train.eval_every": (train.eval_every, 0),
        "train.eval_sequences": (train.eval_sequences, 0),
        "train.sample_tokens": (train.sample_tokens, 0),
        "train.save_every": (train.save_every, 0),
        "train.keep_last": (train.keep_last, 0),
        "train.keep_every": (train.keep_every, 0),
        "train.watchdog_minutes": (train.watchdog_minutes, 0),
        "train.profile_steps": (train.profile_steps, 0),
        "data.num_workers": (data.num_workers, 0),
        "data.shard_tokens": (data.shard_tokens, 1),
        "data.prefetch": (data.prefetch, 0),
        "data.tokenizer_vocab_size": (data.tokenizer_vocab_size, 257),
        "optim.warmup_steps": (optim.warmup_steps, 0),
        "optim.grad_clip": (optim.grad_clip, 0),
        "optim.weight_decay": (optim.weight_decay, 0),
        "engine.sequence_parallel_size": (config.engine.sequence_parallel_size, 1),
        "engine.bucket_size": (config.engine.bucket_size, 1),
        "engine.loss_scale": (config.engine.loss_scale, 0),
        "logging.wandb_timeout_s": (config.logging.wandb_timeout_s, 0),
        "seed": (config.seed, 0),
    }
    if config.seed >= 1 << 63:
        yield f"seed is {config.seed}: it must be below 2^63."
    if not config.name:
        yield "name is empty: it names the run folder, runs/NAME, and the run in wandb."
    at_least |= {"data.max_documents": (data.max_documents, 1)} if data.max_documents is not None else {}
    at_least |= {"optim.decay_steps": (optim.decay_steps, 1)} if optim.decay_steps is not None else {}
    for key, (value, minimum) in at_least.items():
        if not value >= minimum:
            yield f"{key} is {value}: it must be at least {minimum}."
    positive = {
        "optim.lr": optim.lr,
        "optim.eps": optim.eps,
        "engine.timeout_minutes": config.engine.timeout_minutes,
    }
    for key, value in positive.items():
        if not value > 0:
            yield f"{key} is {value}: it must be above 0."
    shares = {"optim.beta1": optim.beta1, "optim.beta2": optim.beta2}
    shares |= {"data.validation_fraction": data.validation_fraction}
    for key, value in shares.items():
        if not 0 <= value < 1:
            yield f"{key} is {value}: it must be at least 0 and below 1."
    if not 0 <= optim.min_lr_ratio <= 1:
        yield f"optim.min_lr_ratio is {optim.min_lr_ratio}: it must be between 0 and 1."
    if config.hardware.peak_tflops is not None and not config.hardware.peak_tflops > 0:
        yield f"hardware.peak_tflops is {config.hardware.peak_tflops}: give TFLOP/s above 0, or null."


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.mixture:
        try:
            check_mixture(data)
        except UserError as error:
            yield str(error)
    else:
        yield from _source(data)
    splits = [source.validation_split for source in data.mixture] or [data.validation_split]
    if not all(splits) and not data.validation_fraction and config.train.eval_every:
        yield "train.eval_every needs a validation split: set data.validation_fraction above 0, or train.eval_every=0."


def _source(data: DataConfig) -> Iterator[str]:
    """A corpus of one source."""
    if data.source is Source.mixture:
        yield EMPTY
    elif data.source is not Source.stdlib and not data.path:
        what = "the dataset's name" if data.source is Source.hub else "a file, a folder or a glob"
        yield f"data.path is not set: data={data.source} needs {what} (data.path=...)."
    if data.source is Source.stdlib and data.path:
        yield f"data.path is {data.path!r}, which data=stdlib does not read: choose data=text, jsonl, parquet or hub."
    if data.source is not Source.hub and data.validation_split is not None:
        yield "data.validation_split is for data=hub: use data.validation_fraction."


def _optim(config: RunConfig) -> Iterator[str]:
    if config.optim.decay_steps is not None and config.optim.schedule is Schedule.constant:
        yield "optim.decay_steps has no meaning with optim.schedule=constant: remove one of them."


def _engine(config: RunConfig) -> Iterator[str]:
    engine = config.engine
    if engine.loss_scale and engine.precision not in (Precision.fp16, Precision.auto):
        yield f"engine.loss_scale is for engine.precision=fp16, not {engine.precision}: set it to 0."


def _device(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.hardware.device is Device.cuda and not torch.cuda.is_available():
        yield "hardware.device is cuda, but PyTorch sees no GPU here: use hardware=auto or hardware=cpu."
        return
    on_gpu = config.hardware.device is not Device.cpu and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    try:
        precision = resolve_precision(config.engine.precision, device)
        check_engine(config.engine, precision, device)
    except UserError as error:
        yield str(error)
        return
    yield from _toggles(config, precision, device, world_size)
    if check(config.model, config.data.document_mask):
        return  # said before; what follows builds on it
    try:
        check_fp8(config.engine, config.model, precision, device)
    except UserError as error:
        yield from str(error).splitlines()
    if config.model.attention is not Attention.auto:
        try:
            resolve_attention(config.model, device, DTYPES[precision])
        except UserError as error:
            yield str(error)


def _toggles(config: RunConfig, precision: Precision, device: torch.device, world_size: int) -> Iterator[str]:
    """What is `on` and can't be."""
    questions: tuple[Callable[[], object], ...] = (
        lambda: should_be_lean(config.engine),
        lambda: should_fuse_weight_gradients(
            config.engine, precision, world_size, may_have_peers(config.engine, precision, device, world_size)
        ),
        lambda: should_fuse_step(config.optim, config.engine, precision, device),
    )
    said: dict[str, None] = {}  # the later ask the first too
    for question in questions:
        try:
            question()
        except UserError as error:
            said[str(error)] = None
    yield from said
