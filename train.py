"""Train GPT-2 in NumPy, from scratch or from a pretrained model: python train.py --help

This file has the training loop. Its parts are in training/: gradients (autograd.py, fused.py), the loss (loss.py), the
optimizer (adamw.py), the data (dataset.py), and the Trainer (trainer.py) and Report (report.py) that the loop is given.
"""

import time

from training.adamw import global_norm, learning_rate_at
from training.loss import lm_loss  # noqa: F401 (for `from train import lm_loss`)
from training.trainer import stop_on_ctrl_c


def train(trainer, report):
    """Train until max_iters steps are done and return True, or return False if Ctrl-C stops it before."""
    options, state = trainer.options, trainer.state
    with trainer.threads(), report, stop_on_ctrl_c(report.say) as stop:
        while True:
            finished = state.step >= options.max_iters
            if state.step != state.evaluated_step and (finished or state.step % options.eval_interval == 0):
                losses = trainer.evaluate()
                is_best = trainer.save_if_best(losses["val_loss"])
                report.log(losses)
                trainer.save()
                report.evaluation(losses, is_best)
            if finished or stop.is_set():
                break
            started = time.perf_counter()
            figures = train_step(trainer)
            report.step(figures, time.perf_counter() - started)
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
    loss, gradients = 0.0, {}
    for micro_step in range(trainer.options.gradient_accumulation_steps):
        trainer.seed(micro_step)
        inputs, targets = trainer.get_batch()  # [batch, n_seq], [batch, n_seq]
        loss += trainer.forward_backward(inputs, targets, gradients)  # adds to the gradients
    norm = global_norm(gradients, trainer.pool.map)
    trainer.check_finite({"loss": loss, "norm of the gradients": norm})
    return loss, gradients, norm


if __name__ == "__main__":
    from cli.train import run

    raise SystemExit(run())
