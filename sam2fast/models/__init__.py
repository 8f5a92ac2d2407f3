"""SAM 2 and 2.1: the model, its parts, and the simulated user of training."""
