"The trainer, a program of its own: evaluation, metrics, checkpoints, guard."
