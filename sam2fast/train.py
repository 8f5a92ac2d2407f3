"""Entry point of `deepspeed sam2fast/train.py`, `torchrun sam2fast/train.py` and `python sam2fast/train.py`.

deepspeed sam2fast/train.py --config configs/quickstart_davis.yaml data.root=PATH
"""

import argparse
import importlib.util
import sys
from pathlib import Path


def use_checkout() -> None:
    """Make both packages importable from a bare checkout, and nothing else from this folder.

    Python puts the script's own folder first on sys.path, where its modules would shadow others of the same name.
    """
    folder = Path(__file__).resolve().parent
    root = folder.parent
    packages = {"sam2fast": folder, "sam2fast_kernels": root / "kernels"}
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    if not (root / "kernels" / "__init__.py").is_file():
        return  # installed: both packages are importable already
    # By name, not by putting the root on sys.path: its folder kernels/ would hide the package `kernels`.
    for name, package in packages.items():
        if name not in sys.modules:
            location = [str(package)]
            spec = importlib.util.spec_from_file_location(
                name, package / "__init__.py", submodule_search_locations=location
            )
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train SAM 2: every setting is in the config or an override."
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--deepspeed", action="store_true", help="use the DeepSpeed engine")
    parser.add_argument("--deepspeed_config", metavar="JSON", help="DeepSpeed settings; implies --deepspeed")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example model.size=tiny stages.0.steps=10"
    )
    args = parser.parse_intermixed_args(argv)

    from sam2fast.cli import train

    overrides = list(args.overrides)
    if args.deepspeed or args.deepspeed_config:
        others = [text for text in overrides if text in ("engine.kind=torch", "engine.kind=fsdp")]
        if others:
            print(f"error: --deepspeed and --deepspeed_config choose DeepSpeed, {others[-1]} does not; remove one",
                  file=sys.stderr)  # fmt: skip
            return 2
        overrides.append("engine.kind=deepspeed")
    if args.deepspeed_config:
        overrides.append(f"engine.deepspeed_config={args.deepspeed_config}")
    return train(args.config, overrides, args.local_rank)


use_checkout()

if __name__ == "__main__":
    sys.exit(main())
