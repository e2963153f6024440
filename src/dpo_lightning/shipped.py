"""What ships with the package: the configurations, by name, and the files of the demo."""

from pathlib import Path

PACKAGE = Path(__file__).parent
CHECKOUT = PACKAGE.parents[1]  # without an installed copy, configurations are at the repository's top


def shipped_configs() -> dict[str, Path]:
    """The configurations that ship with the package, by name: "gpt2", "lora", "loggers/csv"."""
    folder = next((path for path in (PACKAGE / "configs", CHECKOUT / "configs") if path.is_dir()), PACKAGE)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def shipped_file(name: str) -> Path | None:
    """The demo's file or folder that a path such as "dpo_lightning/demo/model" names from any working directory."""
    path = PACKAGE.parent / name
    return path if Path(name).parts[:2] == (PACKAGE.name, "demo") and path.exists() else None
