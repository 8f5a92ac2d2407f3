"""What the dataloader case compares: clips on disk, and the pipeline of the official trainer over them."""
