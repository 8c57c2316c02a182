"""Train GPT-2 in NumPy, from scratch or from a pretrained model: python train.py --help

This file has the training loop. Its parts are in training/: batches, gradients and saving (trainer.py), backward passes
(autograd.py, fused.py), the loss (loss.py), the optimizer (adamw.py), the data (dataset.py), and the reports
(report.py).
"""

import time

from training.adamw import learning_rate_at
from training.loss import lm_loss  # noqa: F401 (for `from train import lm_loss`)
from training.trainer import stop_on_ctrl_c


def train(trainer, report):
    """Train until max_iters steps are done; return True, or False if Ctrl-C stopped it earlier."""
    options, state = trainer.options, trainer.state
    trainer.start_clock()
    with trainer.running(), report, stop_on_ctrl_c(report.say) as stop:
        while True:
            finished = state.step >= options.max_iters
            is_due = finished or state.step % options.eval_interval == 0 or state.best_step < 0  # -1: no model saved
            if is_due and state.step != state.evaluated_step:  # a resumed run may have evaluated this step already
                losses = trainer.evaluate()  # saves the model if its validation loss is the lowest so far
                report.log(losses)  # before save(): after a crash in between, --resume drops this line
                trainer.save()
                report.show_evaluation(losses)
            if finished or trainer.any_process(stop.is_set()):
                break
            started = time.perf_counter()
            metrics = train_step(trainer)
            report.show_step(metrics, time.perf_counter() - started)
        if state.step != state.saved_step:
            trainer.save()
    return finished


def train_step(trainer):
    """Update every parameter once; return the loss before the update, the learning rate and the gradients' norm."""
    learning_rate = learning_rate_at(trainer.state.step, *trainer.options.schedule)
    loss, norm = trainer.update(learning_rate)
    trainer.state.step += 1
    return {"loss": loss, "learning_rate": learning_rate, "gradient_norm": norm}


if __name__ == "__main__":
    from cli.train import run

    raise SystemExit(run())
