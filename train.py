"""Train GPT-2 in NumPy, from scratch or from a pretrained model: python train.py --help

This file has the training loop. Its parts are in training/: gradients (autograd.py, fused.py), the loss (loss.py), the
optimizer (adamw.py), the data (dataset.py), saving (trainer.py), and the reports (report.py).
"""

import time

from training.adamw import global_norm, learning_rate_at
from training.loss import lm_loss  # noqa: F401 (for `from train import lm_loss`)
from training.trainer import stop_on_ctrl_c


def train(trainer, report):
    """Train until max_iters steps are done; return True, or False if Ctrl-C stopped it earlier."""
    options, state = trainer.options, trainer.state
    trainer.start_clock()
    with trainer.threads(), report, stop_on_ctrl_c(report.say) as stop:
        while True:
            finished = state.step >= options.max_iters
            is_due = finished or state.step % options.eval_interval == 0 or state.best_step < 0  # -1: no model saved
            if is_due and state.step != state.evaluated_step:  # a resumed run may have evaluated this step already
                losses = trainer.evaluate()  # saves the model if its validation loss is the lowest so far
                report.log(losses)  # before save(): after a crash in between, --resume drops this line
                trainer.save()
                report.show_evaluation(losses)
            if finished or stop.is_set():
                break
            started = time.perf_counter()
            metrics = train_step(trainer)
            report.show_step(metrics, time.perf_counter() - started)
        if state.step != state.saved_step:
            trainer.save()
    return finished


def train_step(trainer):
    """Update every parameter once; return the loss before the update, the learning rate and the gradients' norm."""
    options, state = trainer.options, trainer.state
    loss, gradients, norm = compute_gradients(trainer)
    learning_rate = learning_rate_at(state.step, *options.schedule)
    clip = min(1.0, options.grad_clip / norm) if options.grad_clip and norm else 1.0
    trainer.optimizer.update(gradients, learning_rate, clip, trainer.pool.map)
    state.step += 1
    return {"loss": loss, "learning_rate": learning_rate, "gradient_norm": norm}


def compute_gradients(trainer):
    """Return the mean loss over the batches of a step, its gradients by tensor name, and their global norm.

    Raises UserError if the loss or the norm is not finite.
    """
    options, loss, gradients = trainer.options, 0.0, {}
    for micro_step in range(options.gradient_accumulation_steps):
        seed = options.seed, trainer.state.step, micro_step  # determines the batch and its dropout, resumed or not
        inputs, targets = trainer.get_batch(seed)  # [batch, n_seq] each
        loss += trainer.forward_backward(inputs, targets, gradients, seed)  # adds to gradients
    norm = global_norm(gradients, trainer.pool.map)
    trainer.check_finite({"loss": loss, "norm of the gradients": norm})
    return loss, gradients, norm


if __name__ == "__main__":
    from cli.train import run

    raise SystemExit(run())
