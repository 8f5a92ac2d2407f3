"""train.py that also times every step: one rank of `measure.py`. Writes, to the file that RECORD names with `.RANK`
added, one JSON object when a stage ends."""

import json
import os
import resource
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from sam2fast import train  # noqa: E402  (first: it makes both packages importable)


def main() -> int:
    import torch

    from sam2fast import recipe

    class TimedTrainer(recipe.StageTrainer):
        """A step lasts from asking for its batches to asking for the next ones, logging included. On a GPU it begins
        when the device has ended the one before: the host does not queue steps ahead here, as it does otherwise."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.steps, self.forwards = [], []
            run_forward = self.engine.forward

            def forward(*given):
                with self._timed(self.forwards):
                    return run_forward(*given)

            self.engine.forward = forward

        def _timed(self, spans):
            return Span(spans, self.ranks.device)

        def train(self):
            super().train()
            self._mark()
            del self.engine.forward  # in a cycle with the engine
            self._write()

        def _mark(self):
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self.steps:
                self.steps[-1]["seconds"] = now - self.steps[-1].pop("began")
                self.steps[-1]["forward"] = sum(seconds() for seconds in self.forwards)
            self.forwards.clear()
            return now

        def _next_batches(self):
            began = self._mark()
            batches = super()._next_batches()
            step = {"began": began, "loading": time.perf_counter() - began, "videos": 0, "frame_objects": 0}
            for batch in batches:
                step["videos"] += len(batch.sample_ids)
                step["frame_objects"] += batch.num_objects * batch.num_frames
            self.steps.append(step)
            return batches

        def _write(self):
            cuda = self.ranks.device.type == "cuda"
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            result = {
                "rank": self.ranks.rank,
                "steps": self.steps,
                "peak_bytes": torch.cuda.max_memory_allocated() if cuda else peak,
                "device": torch.cuda.get_device_name() if cuda else "cpu",
            }
            Path(f"{os.environ['RECORD']}.{self.ranks.rank}").write_text(json.dumps(result))

    class Span:
        """Adds, to a list, a function that gives the seconds between its begin and end."""

        def __init__(self, spans, device):
            self.spans, self.cuda = spans, device.type == "cuda"

        def _now(self):
            if not self.cuda:
                return time.perf_counter()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        def __enter__(self):
            self.begin = self._now()

        def __exit__(self, *_):
            begin, end = self.begin, self._now()
            self.spans.append((lambda: begin.elapsed_time(end) / 1e3) if self.cuda else (lambda: end - begin))

    recipe.StageTrainer = TimedTrainer
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
