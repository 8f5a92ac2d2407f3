"""train.py with a fault on one rank, for fault_table.py and the tests: FAULT=KIND:RANK:STEP.

Kinds: seed (another seed), plan (another prompt than the other ranks), stall (loads data without end), memory (an
allocation that no machine has room for), nan (a loss that is not finite, from this step on), full (files end after
50 kB: a full disk), kill (kills itself, the first time only: FAULT_ONCE names a file that remembers)."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# Loader processes import this file too: what they do not need is imported where it is used.
from sam2fast import train  # noqa: E402  (first: it makes both packages importable)


def main() -> int:
    kind, rank, step = os.environ["FAULT"].split(":")
    if os.environ.get("RANK", "0") == rank:
        install(kind, int(step))
    return train.main()


def install(kind: str, step: int) -> None:
    import resource

    import torch

    from sam2fast import recipe, step_plan

    if kind == "seed":
        sys.argv.append("seed=12345")
        return
    draw = step_plan.StepPlanner.plan

    class FaultyTrainer(recipe.StageTrainer):
        def _next_batches(self):
            if kind == "stall" and self.state.global_step == step:
                time.sleep(3600)
            if kind == "full" and self.state.global_step == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            if kind == "kill" and self.state.global_step == step and not Path(os.environ["FAULT_ONCE"]).exists():
                Path(os.environ["FAULT_ONCE"]).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._next_batches()

        def _terms(self, *args):
            if kind == "memory" and self.state.global_step == step:
                torch.empty(2**50)
            terms = super()._terms(*args)
            if kind == "nan" and self.state.global_step >= step:
                terms = {name: value * float("nan") for name, value in terms.items()}
            return terms

    def other_plan(self, index: int):
        plan = draw(self, index)
        if plan is None or index != step:
            return plan
        mode = "mask" if plan.rollout.mode == "point" else "point"
        return replace(plan, rollout=replace(plan.rollout, mode=mode))

    if kind == "plan":
        step_plan.StepPlanner.plan = other_plan
    else:
        recipe.StageTrainer = FaultyTrainer


if __name__ == "__main__":
    sys.exit(main())
