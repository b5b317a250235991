"""The parts of a run, put together, and what happens between its steps.

`Trainer` is made in the order of the journey of a token: corpus, model, engine, the checkpoint to go on from, and the
record of what happens. `train.py` holds the loop and calls the verbs below.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Self, cast

import numpy as np
import torch

from configs.errors import OUT_OF_MEMORY, OutOfMemoryError, UserError
from configs.schema import Fp8, NonFinite, Precision, RunConfig
from data import (
    GlobalBatch,
    MicroBatch,
    PreparedData,
    TokenDataset,
    TokenLoader,
    evaluation_batches,
    load_tokenizer,
    prepare,
)
from data.preparation import Progress as DataProgress
from data.preparation import ProgressCallback
from data.progress import show_progress
from data.report import describe_packing
from data.tokenizer import name_separator
from model import build_model, resolve_attention
from model.flops import causal_flops_of_documents, flops_per_token, parameter_counts
from model.generate import generate
from training import checkpoint, rng
from training import metrics as m
from training.backend import DTYPES, arithmetic, resolve_precision
from training.batch import data_ranks, resolve_batch
from training.console import RunSummary, print_summary, short_path
from training.engine import Engine, build_engine
from training.hardware import Peak, device_peak
from training.logging import STEP, RunLogger, read_metrics, system_info
from training.memory import outlook
from training.metrics import FP8_CEILING, Throughput, ThroughputMeter
from training.peers import explain
from training.plot import plot_curves
from training.profile import PICTURE, StepProfiler
from training.progress import Progress
from training.resume import Start, begins_elsewhere, finds_checkpoint, resume
from training.run import RECORD, keep_config, move_aside
from training.saver import Saver
from training.schedule import learning_rate
from training.session import Session
from training.state import TrainState
from training.step import Step, StepResult
from training.summary import summarise
from training.watchdog import Watchdog
from training.waterfall import Report, TraceError

SAMPLE_TEMPERATURE = 0.8
SAMPLE_TOP_K = 50


class Trainer:
    """A run between its first and its last step; a context manager.

    Raises `UserError` for a corpus, a checkpoint or an engine that can't be had.
    """

    engine: Engine
    state: TrainState
    loader: TokenLoader

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = session.config
        self.processes = session.processes
        self.started = time.monotonic()
        self.validated_at = -1
        self.unevaluated = False
        """After `finish`: whether all steps are done, but a signal came before the evaluation that belongs to the last.
        """
        self.last: Step | None = None
        """The last step, whose result may not be known yet."""
        self.unread = False
        """Whether the result of `last` has yet to be looked at."""
        self.unlogged = False
        """Whether the metrics of `last` are to be written once its result is known."""
        self.report: Report | None = None
        """Where the time of a step goes, once `train.profile_steps` have been profiled."""
        self.watchdog = Watchdog(self.config.train.watchdog_minutes)
        self.cleanup = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # undone if a part can't be made
            self._build(stack)
            self.cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.session.peers.ending()  # the others may be done with it long before, and must not be taken for lost
        if error is not None and not isinstance(error, KeyboardInterrupt):
            with suppress(Exception):  # the first error is the one to tell
                if self.last is not None and self.last.is_here:
                    self.learn(failed=True)
            self.saver.settle()  # what was begun to be saved before the error is sound
        self.logger.finish(0 if error is None else 1)
        self.cleanup.close()
        if error is not None:
            explain(error, self.config.engine, self.processes.world_size)
        if isinstance(error, torch.OutOfMemoryError):
            counted = self._outlook()
            raise OutOfMemoryError(
                f"{OUT_OF_MEMORY} at train.micro_batch_size={self.plan.micro_batch_size}: lower it, or set "
                "engine.recompute=block, or shard more (engine=zero2, zero3 on several GPUs)."
                + (f" Counted beforehand: {counted[1]}." if counted else "")
            ) from error

    def _outlook(self) -> tuple[bool, str] | None:
        """See `training.memory.outlook`; None where it isn't known, as on a CPU."""
        device, engine = self.processes.device, self.config.engine
        if device.type != "cuda" or resolve_precision(engine.precision, device) is not Precision.bf16:
            return None
        return outlook(
            self.model_config,
            engine,
            self.plan.micro_batch_size,
            self.processes.world_size,
            torch.cuda.get_device_properties(device).total_memory,
            neighbours=torch.cuda.device_count(),
        )

    def _build(self, stack: ExitStack) -> None:
        config, session, processes = self.config, self.session, self.processes
        with show_progress(session.terminal.console) as report:
            self.corpus = prepare(config.data, stopping(report, session))
        self.tokenizer = load_tokenizer(self.corpus)
        self.model_config = replace(config.model, vocab_size=vocabulary(config, self.corpus))
        self.replicas = data_ranks(config.engine, processes.world_size)
        self.plan = resolve_batch(config.train, self.replicas)
        counted = self._outlook()
        if counted is not None and counted[0]:
            session.terminal.warn(counted[1])
        self.loader = self._loader()
        rng.seed_all(config.seed)  # the same initial weights on every rank
        with torch.device("meta"):  # the engine draws the weights, in its precision and with all CPUs
            model = build_model(self.model_config)
        draw = not finds_checkpoint(config, session.folder, processes)
        self.engine = build_engine(model, config, self.plan, processes, draw=draw)
        stack.callback(self.engine.close)
        rng.seed_rank(config.seed, processes.rank)  # different dropout on every rank
        start = resume(self.engine, config, session.folder, self.corpus, self.loader, session.terminal, drawn=draw)
        self.state = start.state
        if processes.is_main:
            keep_config(session.folder)
            shutil.copyfile(self.corpus.tokenizer_path, session.folder.tokenizer)
            name_separator(session.folder.path, self.corpus.manifest.eos_token)
            self._keep_earlier_metrics()
        self.first_step = self.saved_at = self.state.step
        # Measured on one rank while the others wait: on a shared CPU they would slow each other down.
        self.peak = cast(Peak, processes.broadcast(self._measure_peak() if processes.is_main else None))
        self.saver = self._saver(start)
        stack.callback(self.saver.close)
        self.logger = self._logger()
        self.state.wandb_id = self.logger.wandb_id
        self.meter = self._meter()
        self.profiler = self._profiler()
        stack.callback(self.profiler.close)
        self.progress = Progress(
            session.terminal, config.train.steps, initial_step=self.state.step, mode=config.logging.progress
        )
        self._say_what_runs()
        stack.enter_context(self.progress)
        stack.enter_context(self.watchdog)
        self.watchdog.compiling()
        self.meter.start()

    def _keep_earlier_metrics(self) -> None:
        """A run that starts anew beside the record of an earlier one, whose checkpoints are gone, leaves it whole. So
        does one that goes on from a run elsewhere: a record is of one run."""
        folder = self.session.folder
        elsewhere = begins_elsewhere(self.config, folder)
        if (self.state.step == 0 or elsewhere) and read_metrics(folder.metrics):
            kept = move_aside(folder, RECORD)
            assert kept is not None
            why = "there is no checkpoint to go on from: the run starts anew"
            why = f"resume={self.config.resume} is another run" if elsewhere else why
            self.session.terminal.warn(f"{why}, earlier metrics are in {short_path(kept)}")

    def _loader(self) -> TokenLoader:
        config, processes = self.config, self.processes
        return TokenLoader(
            self.corpus.train,
            sequence_length=config.model.sequence_length,
            global_batch_size=self.plan.global_batch_size,
            micro_batch_size=self.plan.micro_batch_size,
            rank=processes.rank // config.engine.sequence_parallel_size,
            world_size=self.replicas,
            seed=config.seed,
            shuffle=config.data.shuffle,
            packing=config.data.packing,
            document_mask=config.data.document_mask,
            prefetch=config.data.prefetch,
            device=processes.device,
        )

    def _logger(self) -> RunLogger:
        return RunLogger(
            self.session.folder,
            self.config,
            resume_step=self.state.step,
            wandb_id=self.state.wandb_id,
            info={**system_info(self.processes.world_size), "peak": str(self.peak)},
            enabled=self.processes.is_main,
        )

    def _saver(self, start: Start) -> Saver:
        train, folder = self.config.train, self.session.folder.checkpoints
        return Saver(
            self.engine,
            folder,
            tokenizer_hash=self.corpus.tokenizer_hash,
            keep_last=train.keep_last,
            keep_every=train.keep_every,
            abandoned=checkpoint.left_behind(folder, start.origin) if self.processes.is_main else (),
            asynchronous=train.async_save,
            progress=self.watchdog.beat,
        )

    def _measure_peak(self) -> Peak:
        hardware = self.config.hardware
        tf32 = hardware.tf32 and not self.config.deterministic
        peak = device_peak(self.processes.device, self.engine.precision, hardware.peak_tflops, tf32)
        recipe = self.config.engine.fp8
        return peak if recipe is Fp8.none else replace(peak, note=f"{peak.note}; engine.fp8={recipe} can exceed it")

    def _meter(self) -> ThroughputMeter:
        measured = self.peak.source == "measured" and self.processes.is_main
        flops = flops_per_token(self.model_config)
        return ThroughputMeter(
            flops_per_token=flops.megatron,
            flops_per_token_causal=flops.causal,
            peak_tflops=self.peak.tflops,
            world_size=self.processes.world_size,
            device=self.processes.device,
            remeasure=(lambda: self._measure_peak().tflops) if measured else None,
            ceiling=1.0 if self.config.engine.fp8 is Fp8.none else FP8_CEILING,
        )

    def _profiler(self) -> StepProfiler:
        return StepProfiler(
            self.config,
            self.model_config,
            self.plan,
            self.engine,
            self.peak,
            self.session.folder,
            self.meter,
            steps_left=self.config.train.steps - self.state.step,
        )

    def _say_what_runs(self) -> None:
        config, plan, world = self.config, self.plan, self.processes.world_size
        count = parameter_counts(self.model_config).total
        attention = resolve_attention(self.model_config, self.processes.device, DTYPES[self.engine.precision])
        ranks = "1 rank" if world == 1 else f"{world} ranks"
        shared = config.engine.sequence_parallel_size
        takers = ranks if shared == 1 else f"{self.replicas} of {shared} ranks"
        say = self.session.terminal.say
        say(
            f"{config.name}: {count / 1e6:,.1f} M parameters, {attention} attention, "
            f"{arithmetic(config.engine, self.engine.precision)}, ZeRO-{config.engine.zero_stage}, "
            f"{ranks} on {self.peak.device_name}"
        )
        if config.engine.fp8 is not Fp8.none:
            emulated = ", emulated" if self.processes.device.type == "cpu" else ""
            say(f"  engine.fp8={config.engine.fp8}{emulated}: MFU is of the bf16 peak all the same")
        tokens = plan.global_batch_size * config.model.sequence_length
        say(
            f"{self.corpus.train.num_tokens:,} training tokens; {tokens:,} a step: {plan.global_batch_size} sequences "
            f"of {config.model.sequence_length} ({takers} × {plan.accumulation_steps} × {plan.micro_batch_size})"
        )
        if self.loader.packing is not None:
            say(f"  {describe_packing(self.loader.packing, self.corpus.train)}")
        epochs = self.loader.source_epochs(config.train.steps * plan.global_batch_size)
        for part in self.corpus.parts if epochs else ():
            say(
                f"  {part.name}: {part.share:.2%} of them, {part.train.num_tokens:,} tokens, "
                f"{epochs[part.name]:.2f} epochs in {config.train.steps:,} steps"
            )
        if config.optim.warmup_steps >= config.train.steps:
            self.session.terminal.warn(
                f"optim.warmup_steps={config.optim.warmup_steps} is not below train.steps={config.train.steps}: "
                "the learning rate never reaches its peak"
            )
        if self.profiler.problem:
            self.session.terminal.warn(self.profiler.problem)
        if self.logger.wandb_note:
            say(f"wandb {self.logger.wandb_note}")

    def batches(self) -> Generator[GlobalBatch, None, None]:
        """Global batches from where the run stands, without end."""
        with closing(self.loader.batches(self.state.consumed_samples)) as source:
            while True:
                if self.profiler.is_due:
                    self.learn()  # what belongs to the steps before is neither profiled nor taken from their meter
                self.profiler.begin_step()
                with self.profiler.waiting():
                    batch = next(source)
                yield batch

    def advance(self, batch: GlobalBatch, step: Step) -> None:
        """Count a finished step. Raises `UserError` if it, or the one before, wasn't finite, unless such are skipped.

        A step that the device decides of is looked at when the next one has been handed over; see `learn`.
        """
        self.learn()
        state = self.state
        state.step += 1
        state.consumed_samples = batch.next_sample
        state.tokens_seen += batch.valid_tokens
        self.last, self.unread = step, True
        if step.known:
            self.learn()
        if not self.profiler.running:
            self.meter.step(batch.valid_tokens, batch.wait_s, self._causal_flops(batch))
        self._end_profiled_step()
        self.progress.advance(state.step)
        self.watchdog.beat()
        self.saver.poll()  # a save that has failed ends the run here

    def _causal_flops(self, batch: GlobalBatch) -> float | None:
        """FLOPs a token where documents don't see each other, by this rank's, which stand for all; None elsewhere."""
        lengths = [micro.document_lengths for micro in batch.micro_batches if micro.document_lengths is not None]
        return causal_flops_of_documents(self.model_config, np.concatenate(lengths)) if lengths else None

    def learn(self, *, failed: bool = False) -> None:
        """Look at the last step's result, and write its metrics if that is due. Waits for the device if it must.

        Comes before whatever uses the weights or saves them, so that nothing is built on a step that has failed.
        Raises `UserError` if it wasn't finite, unless such steps are skipped.

        failed: the run ends with an error, so the row goes without throughput. That is known only once the device has
        done the step's update, in which it may wait for a rank that is gone until the collective's timeout.
        """
        if self.last is None:
            return
        unread, unlogged = self.unread, self.unlogged
        self.unread = self.unlogged = False
        result = self.last.result()
        if unread and result.finite:
            self.state.last_loss = result.loss
        elif unread:
            self._nonfinite(result)
        if unlogged and failed:
            self._log(result, None)
        elif unlogged:
            with self._aside():
                self._log(result, self.meter.report())

    def _end_profiled_step(self) -> None:
        """Say and show what the profile found, once its last step is done."""
        try:
            report = self.profiler.end_step()
        except (TraceError, OSError) as error:  # the run itself is sound
            self.session.terminal.warn(f"There is no waterfall of this run: {error}")
            return
        if report is None:
            return
        self.report = report
        with self._aside():
            picture = self.session.folder.path / PICTURE
            self.session.terminal.say(f"{report.num_steps} steps profiled; {short_path(picture)}: where the time goes")
            self.logger.log_image(self.state.step, "waterfall", picture)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What happens inside is no part of a step, in the metrics and in a profile."""
        with self.meter.excluded(), self.profiler.excluded():
            yield

    def _nonfinite(self, result: StepResult) -> None:
        what = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"
        if self.config.train.nonfinite is NonFinite.skip:
            self.state.skipped_steps += 1
            self.session.terminal.warn(f"step {self.state.step} is skipped: {what}")
            return
        raise UserError(
            f"Step {self.state.step} has a non-finite loss or gradient ({what}); its update was not made. "
            f"{self._last_good()} Lower optim.lr, raise optim.warmup_steps, or set train.nonfinite=skip."
        )

    def _last_good(self) -> str:
        self.saver.settle()
        saved = checkpoint.candidates(self.session.folder.path)
        where = f"The last good checkpoint is {short_path(saved[0])}." if saved else "There is no checkpoint yet."
        return f"{where} resume=auto goes on from it." if saved else where

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now."""
        return every > 0 and self.state.step % every == 0

    def log(self) -> None:
        """Write the metrics of the interval that ends with the last step, as soon as its result is known."""
        self.unlogged = True
        if not self.unread:
            self.learn()

    def _log(self, result: StepResult, throughput: Throughput | None) -> None:
        state = self.state
        values: dict[str, float | None] = {
            m.TRAIN_LOSS: result.loss,
            m.TRAIN_PERPLEXITY: m.perplexity(result.loss),
            m.TRAIN_Z_LOSS: result.z_loss if self.config.model.z_loss else None,
            m.LR: learning_rate(state.step - 1, self.config.optim, self.config.train.steps),
            m.GRAD_NORM: result.grad_norm,
            m.LOSS_SCALE: self.engine.loss_scale.scale if self.engine.precision is Precision.fp16 else None,
            m.SKIPPED_STEPS: state.skipped_steps,
            m.PEAK_MEMORY: m.peak_memory_gb(self.processes.device),
            m.TOKENS_SEEN: state.tokens_seen,
            m.EPOCH: state.consumed_samples / self.loader.samples_per_epoch,
        }
        epochs = self.loader.source_epochs(state.consumed_samples)
        values |= {f"{m.EPOCH}/{name}": passes for name, passes in epochs.items()}
        if throughput is not None:
            values |= throughput.metrics()
        self.logger.log(state.step, values)
        self.progress.report(state.step, values)

    def evaluate(self) -> None:
        """Validation loss and a sample of text. A signal in between ends it without a result."""
        self.learn()
        with self._aside(), self.progress.status("evaluating"):
            if self.validated_at < 0:
                self.watchdog.compiling()
            values = self._validate()
            if self.session.interrupts.poll():
                return
            loss = values[m.VAL_LOSS]
            self.validated_at, self.validation = self.state.step, values
            best = self.state.best_validation_loss
            self.state.best_validation_loss = loss if best is None else min(best, loss)
            self.logger.log(self.state.step, values)
            self.progress.evaluation(self.state.step, values)
            if by_source := {key: value for key, value in values.items() if key.startswith(f"{m.VAL_LOSS}/")}:
                self.session.terminal.say("  " + "  ".join(f"{key} {value:.4f}" for key, value in by_source.items()))
            if self.config.train.sample_tokens:
                self._sample()
            self._plot()

    def _validate(self) -> dict[str, float]:
        """Losses on the validation split: of a mixture on each source's, and their mean in the shares of training."""
        loss = num_bytes = bits = 0.0
        by_source: dict[str, float] = {}
        for part in self.corpus.parts:
            loss_sum, tokens = self.engine.evaluate(self._evaluation_batches(part.validation))
            part_loss = loss_sum / max(tokens, 1)  # a signal may have ended it before the first
            part_bits = m.bits_per_byte(part_loss, part.validation.num_tokens, part.validation.num_bytes)
            loss += part.share * part_loss
            num_bytes += part.share * part.validation.bytes_per_token
            bits += part.share * part.validation.bytes_per_token * part_bits
            if part.name:
                by_source[f"{m.VAL_LOSS}/{part.name}"] = part_loss
        return {
            m.VAL_LOSS: loss,
            m.VAL_PERPLEXITY: m.perplexity(loss),
            m.VAL_BITS_PER_BYTE: bits / num_bytes,
            **by_source,
        }

    def _evaluation_batches(self, validation: TokenDataset) -> Iterator[MicroBatch]:
        batches = evaluation_batches(
            validation,
            sequence_length=self.config.model.sequence_length,
            micro_batch_size=self.plan.micro_batch_size,
            num_sequences=self.config.train.eval_sequences,
            rank=self.processes.rank // self.config.engine.sequence_parallel_size,
            world_size=self.replicas,
            document_mask=self.config.data.document_mask,
            device=self.processes.device,
        )
        for batch in batches:
            if self.session.interrupts.poll():  # the same number of batches on every rank, so all come by
                return
            yield batch
            self.watchdog.beat()

    def _sample(self) -> None:
        """Sampled text, the same for the same weights. All ranks take part where the weights are sharded."""
        if not self.processes.is_main and self.config.engine.zero_stage < 3:
            return
        prompt = self.config.train.sample_prompt
        # Without what a tokenizer puts around a text: documents were prepared without, so the model has never seen it.
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids or [self.corpus.eos_id]
        device = self.processes.device
        start = torch.tensor([ids], device=device)  # (1, T)
        generator = torch.Generator(device).manual_seed(self.config.seed)
        tokens = generate(
            self.engine.module,
            start,
            self.config.train.sample_tokens,
            temperature=SAMPLE_TEMPERATURE,
            top_k=SAMPLE_TOP_K,
            generator=generator,
        )
        text = self.tokenizer.decode(tokens[0, len(ids) :].tolist())
        self.progress.sample(self.state.step, prompt, text)
        self.logger.log_sample(self.state.step, prompt, text)

    def _plot(self) -> None:
        if not (self.config.logging.plot and self.processes.is_main):
            return
        try:
            drawn = plot_curves(self.session.folder.metrics, self.session.folder.curves, self.config.name)
        except OSError as error:  # a full disk must not end a run for the sake of a picture
            self.session.terminal.warn(f"{self.session.folder.curves} can't be written: {error.strerror}")
            return
        if drawn is not None:
            self.logger.log_image(self.state.step, "curves", drawn)

    def save(self) -> None:
        """Save the state after the last finished step; with `train.async_save` the disk is waited for later."""
        self.learn()
        with self._aside(), self.progress.status("saving"):
            self.saver.save(self.state)
            self.saved_at = self.state.step

    def finish(self) -> None:
        """Evaluate and save what the last step left undone; say where things are and what to run next.

        A signal leaves no time for an evaluation. If it was the last one, the next start makes it.

        Raises `UserError` where a signal asks for another start, which would have nothing to go on from.
        """
        self.learn()
        train, state = self.config.train, self.state
        stopped = self.session.interrupts.poll()
        self.unevaluated = self._lacks_evaluation()
        if self.unevaluated and not stopped:
            self.evaluate()
            self.unevaluated = self.validated_at != state.step
        if train.save_every and self.saved_at != state.step:
            self.save()
        with self._aside(), self.progress.status("saving"):
            self.saver.wait()
        if self.last is not None:
            with self._aside():
                self._plot()
        self.meter.report()  # what the last log line didn't cover
        self.cleanup.close()
        lost = self.exit_code != 0 and not train.save_every
        self.logger.finish(1 if lost else 0)
        if self.processes.is_main:
            print_summary(self.session.terminal, self._summary())
        if lost:
            raise UserError(
                "SIGUSR1 asks for another start, and with train.save_every=0 nothing is saved: it would begin at step "
                f"{self.first_step:,} again, and not after step {state.step:,} of {train.steps:,}. "
                "Give a train.save_every above 0; a signal saves too then."
            )

    def _lacks_evaluation(self) -> bool:
        """Whether all steps are done, but not the evaluation after the last, in this start or, by the metrics, in an
        earlier one. Collective."""
        step, train = self.state.step, self.config.train
        if not train.eval_every or step != train.steps or self.validated_at == step:
            return False
        if self.last is not None:
            return True
        rows = read_metrics(self.session.folder.metrics) if self.processes.is_main else []
        return bool(self.processes.broadcast(all(row[STEP] != step or m.VAL_LOSS not in row for row in rows)))

    @property
    def exit_code(self) -> int:
        """After `finish`: 0, or `REQUEUE_EXIT_CODE` if a signal asks for another start and something is left for it."""
        train = self.config.train
        left = self.state.step < train.steps or (self.unevaluated and train.save_every > 0)
        return self.session.interrupts.exit_code if left else 0

    def _summary(self) -> RunSummary:
        return summarise(
            self.config,
            self.session.folder,
            self.state,
            steps_done=self.state.step - self.first_step,
            seconds=time.monotonic() - self.started,
            stopped_by=self.session.interrupts.reason,
            evaluated=self.validated_at == self.state.step,
            unevaluated=self.unevaluated,
            throughput=self.meter.total(),
            peak=self.peak,
            world_size=self.processes.world_size,
            wandb_note=self.logger.wandb_note,
        )


def stopping(report: ProgressCallback, session: Session) -> ProgressCallback:
    """`report`, which ends the run once a signal has come: a preparation takes hours, and is gone on with later.

    Each rank goes by its own signal, since the ranks wait for each other in files and not in a collective.
    """

    def update(progress: DataProgress) -> None:
        if session.interrupts.requested:
            reason, code = session.interrupts.reason, session.interrupts.own_exit_code
            session.terminal.say(f"Stopped by {reason} while preparing the corpus: the same command goes on with it.")
            raise SystemExit(code)
        report(progress)

    return update


def vocabulary(config: RunConfig, corpus: PreparedData) -> int:
    """Tokens of the model's vocabulary. Raises `UserError` where the config's is too small for the corpus."""
    wanted = config.model.vocab_size
    if wanted is not None and wanted < corpus.vocab_size:
        raise UserError(
            f"model.vocab_size={wanted} is smaller than the tokenizer's {corpus.vocab_size}: "
            f"use null, or at least {corpus.vocab_size}."
        )
    return wanted or corpus.vocab_size
