"""The engines that the scaling benchmarks compare."""

from __future__ import annotations

SETTINGS: dict[str, dict] = {
    "torch": {"kind": "torch"},
    "zero0": {"kind": "deepspeed", "zero_stage": 0},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
    "fsdp": {"kind": "fsdp"},
    "hybrid": {"kind": "fsdp", "shard_size": "node"},
}
"""The settings of `engine` in a config, by the name that results use."""
NAMES = {
    "torch": "torch",
    "zero0": "ZeRO 0",
    "zero1": "ZeRO 1",
    "zero2": "ZeRO 2",
    "zero3": "ZeRO 3",
    "fsdp": "FSDP, full",
    "hybrid": "FSDP, hybrid",
}
"""What tables and plots call them."""
