"""When a validation says that training should stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Guard:
    """Stops a run whose video score stands still or whose image score falls.

    Scores are in points (0 to 100). One guard sees every validation of a run; its state belongs in the checkpoint.

    Args:
        patience: validations in a row without a better mean of the video scores before stopping; 0 is off.
        forgetting: points that an image score may lie below its best while it falls; 0 is off.
    """

    def __init__(self, patience: int, forgetting: float) -> None:
        self.patience, self.forgetting = patience, forgetting
        self._best_video: float | None = None
        self._stale = 0
        self._best_image: dict[str, float] = {}
        self._last_image: dict[str, float] = {}

    def update(self, video: Mapping[str, float], image: Mapping[str, float]) -> str | None:
        """Take the J&F and the image scores of one validation by tag; returns why to stop, or None.

        A stage that does not train on video passes no video scores, and so does not lose patience.
        """
        reasons = [self._check_video(video), self._check_image(image)]
        return "; ".join(reason for reason in reasons if reason) or None

    def restart_patience(self) -> None:
        """A new stage begins: it gets the whole patience, and has to beat the best scores so far."""
        self._stale = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything `update` has learned, as plain values for JSON or a checkpoint."""
        return {
            "best_video": self._best_video,
            "stale": self._stale,
            "best_image": dict(self._best_image),
            "last_image": dict(self._last_image),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best_video, self._stale = state["best_video"], int(state["stale"])
        self._best_image, self._last_image = dict(state["best_image"]), dict(state["last_image"])

    def _check_video(self, scores: Mapping[str, float]) -> str | None:
        if not scores:
            return None
        mean = sum(scores.values()) / len(scores)
        if self._best_video is None or mean > self._best_video:
            self._best_video, self._stale = mean, 0
            return None
        self._stale += 1
        if self.patience and self._stale >= self.patience:
            return f"mean J&F has not risen above {self._best_video:.2f} for {self._stale} validations (now {mean:.2f})"
        return None

    def _check_image(self, scores: Mapping[str, float]) -> str | None:
        reason = None
        for tag, score in scores.items():
            best = self._best_image[tag] = max(score, self._best_image.get(tag, score))
            falling = score <= self._last_image.get(tag, score)  # a stage that recovers what one before it lost goes on
            self._last_image[tag] = score
            if self.forgetting and falling and best - score > self.forgetting:
                reason = reason or f"forgetting: {tag} fell {best - score:.2f} points, from {best:.2f} to {score:.2f}"
        return reason
