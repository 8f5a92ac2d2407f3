"""The folder of a run: whose it is, and where a run that was interrupted goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .checkpoint import CheckpointStore
from .checkpoint_header import load_stage
from .config import Config, ConfigError
from .config_file import flatten, load_config, save_config
from .run_state import ResumeError, RunState

FIXED_KEYS = ("model.size", "model.version", "model.image_size", "seed")
"""Settings that a run keeps for its whole life; the names of its stages are others."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run and the decisions that its files imply."""

    path: Path

    def stage(self, config: Config, index: int) -> Path:
        """Where the weights of a finished stage lie."""
        return self.path / "stages" / f"{index + 1}_{config.stages[index].name}"

    def find_state(self, store: CheckpointStore) -> tuple[RunState, Path | None]:
        """Where to go on: after the last finished stage, or inside a stage from its newest checkpoint.

        Raises:
            ResumeError: what was found is damaged.
        """
        ended = sorted(
            (self.path / "stages").glob("[0-9]*_*/state.json"), key=lambda path: int(path.parent.name.split("_")[0])
        )
        state = load_stage(ended[-1].parent) if ended else RunState()
        if latest := store.latest(after=state.global_step):
            return latest[1], latest[0]
        return state, None

    def claim(self, config: Config, resuming: bool) -> None:
        """Make the folder this run's own and save the configuration there.

        Raises:
            ConfigError: it cannot be written, or holds a run that must not be touched.
            ResumeError: the run in it cannot go on with this configuration.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot create output_dir {self.path}: {error.strerror}; set output_dir to a folder that can be "
                "written"
            ) from None
        saved = self.path / "config.yaml"
        if saved.is_file() and not config.checkpoint.resume:
            raise ConfigError(
                f"{self.path} holds a run and checkpoint.resume is false; set another output_dir or delete the folder"
            )
        if saved.is_file() and resuming:
            self._compare(load_config(saved), config)
        try:
            save_config(config, saved)
        except OSError as error:
            raise ConfigError(
                f"cannot write {saved}: {error.strerror}; set output_dir to a folder that can be written"
            ) from None

    def _compare(self, before: Config, now: Config) -> None:
        old, new = flatten(before.model_dump(mode="json")), flatten(now.model_dump(mode="json"))
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        names = {key for key in old if key.startswith("stages.") and key.endswith(".name")}
        fatal = [key for key in changed if key in FIXED_KEYS or key in names]
        if fatal:
            changes = ", ".join(f"{key} from {old.get(key)!r} to {new.get(key)!r}" for key in fatal)
            raise ResumeError(
                f"the run in {self.path} cannot continue with {changes}; undo the change or set another output_dir"
            )
        if changed:
            print(f"warning: continuing with changed settings ({', '.join(changed)}); a change of datasets or "
                  "mixture also changes which samples come from here on")  # fmt: skip
