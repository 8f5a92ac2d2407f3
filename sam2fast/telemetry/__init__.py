"""Numbers on their way from the device to a person: means, logs, progress and the report at the end of a run."""
