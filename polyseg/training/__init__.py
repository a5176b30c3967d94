"""Train a network: trainer, step, losses by name, optimizers, several processes."""
