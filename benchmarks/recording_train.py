"""train.py that also writes, to the file that RECORD names with `.RANK` added, which samples each step used and how
much memory the trainer and its loader processes hold."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Loader processes import this file too: what they do not need is imported where it is used.
from sam2fast import train  # noqa: E402  (first: it makes both packages importable)


def main() -> int:
    import psutil

    from sam2fast import recipe

    def own_memory(process: psutil.Process) -> int:
        """Resident bytes of a process that it shares with no other."""
        return process.memory_full_info().uss

    class RecordingTrainer(recipe.StageTrainer):
        def _step(self, batches):
            super()._step(batches)
            this = psutil.Process()
            workers = [process for process in this.children(recursive=True) if process.ppid() != this.pid]
            line = {
                "step": self.state.global_step,
                "rank": self.ranks.rank,
                "stage": self.stage.name,
                "ids": [sample_id for batch in batches for sample_id in batch.sample_ids],
                "trainer": own_memory(this),
                "workers": [own_memory(process) for process in workers],
            }
            with open(f"{os.environ['RECORD']}.{self.ranks.rank}", "a") as file:
                file.write(json.dumps(line) + "\n")

    recipe.StageTrainer = RecordingTrainer
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
