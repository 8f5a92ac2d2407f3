"""train.py that also writes which samples each step used, to the file that RECORD names with `.rank` added."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sam2fast import train  # noqa: E402, I001  (first: it makes both packages importable)
from sam2fast import recipe  # noqa: E402


class RecordingTrainer(recipe.StageTrainer):
    def _step(self, batches):
        ids = [sample_id for batch in batches for sample_id in batch.sample_ids]
        line = {"step": self.state.global_step, "rank": self.ranks.rank, "ids": ids}
        with open(f"{os.environ['RECORD']}.{self.ranks.rank}", "a") as file:
            file.write(json.dumps(line) + "\n")
        super()._step(batches)


recipe.StageTrainer = RecordingTrainer

if __name__ == "__main__":
    sys.exit(train.main())
