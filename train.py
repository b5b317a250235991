"""Pretrain a GPT: from a config to the last checkpoint.

    python train.py                                        the default job, on whatever machine this is
    python train.py experiment=gpt2_124m data=text data.path='corpus/*.txt'
    torchrun --nproc_per_node 8 train.py experiment=gpt3_2b7_2k engine=zero2

What a key means is said in configs/schema.py. The parts of this page live in `training/`, the corpus in `data/`, the
transformer in `model/`, its attention kernels in `kernels/`.
"""

from __future__ import annotations

from contextlib import closing

from configs import end_on_ctrl_c, launch

end_on_ctrl_c(__name__)  # the imports take seconds; from `launch` on, a run saves

from configs.schema import RunConfig
from training.schedule import learning_rate
from training.session import Session, open_session
from training.trainer import Trainer


def main(config: RunConfig) -> int:
    """One run on this process's rank. Returns the exit code: 0, or 75 after a signal that asks for a requeue."""
    with open_session(config) as session:  # processes, run folder, log, signals; rank 0's config on every rank
        with Trainer(session) as trainer:  # corpus, model, engine, checkpoint to go on from, metrics
            train(session, trainer)
        return trainer.exit_code


def train(session: Session, trainer: Trainer) -> None:
    """The loop: a batch, a step, and what is due after it."""
    config, engine, state = session.config, trainer.engine, trainer.state
    every = config.train
    with closing(trainer.batches()) as batches:
        while state.step < every.steps and not session.interrupts.poll():
            batch = next(batches)
            step = engine.train_step(batch, learning_rate(state.step, config.optim, every.steps))
            # Step, position in the data, meter. A non-finite loss ends the run here; where the device decides of steps,
            # it is the loss of the step before.
            trainer.advance(batch, step)
            if trainer.due(every.log_every) or state.step == 1:
                trainer.log()
            if trainer.due(every.eval_every):
                trainer.evaluate()
            if trainer.due(every.save_every):
                trainer.save()
    trainer.finish()  # evaluates and saves what the last step left undone, and says where things are


if __name__ == "__main__":
    launch(main)
