"""The files that weights are read from: safetensors, which contain only numbers. Pickled files can run any code.

Imports safetensors alone, so that every layer can ask.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from prefopt.safety.errors import UsageError

PICKLED = ("pytorch_model*.bin", "adapter_model*.bin", "model*.bin", "*.pth", "*.ckpt", "*.pkl")
"""Names under which weights are pickled."""


def pickled(folder: Path) -> list[str]:
    """Names of the pickled weights in a folder."""
    names = (path.name for pattern in PICKLED for path in folder.glob(pattern))
    return sorted(name for name in names if not name.startswith("rng_"))


def check_folder(folder: Path, wanted: str = "*.safetensors") -> None:
    """Refuse a folder whose weights cannot or must not be read; a folder without weights passes.

    Args:
        folder: of a model, an adapter or a checkpoint.
        wanted: the safetensors that would be read.

    Raises:
        ValueError: for pickled weights alone, and for safetensors that are damaged.
    """
    files = sorted(folder.glob(wanted))
    if not files and (names := pickled(folder)):
        raise UsageError(
            f"{folder} holds only pickled weights ({', '.join(names[:3])}), which can run code when they are read: "
            "only safetensors are loaded. If you trust them, load them elsewhere and save them again with "
            "save_pretrained, which writes safetensors"
        )
    for path in files:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"{path} is not a complete safetensors file ({error}): copy or download it again"
            ) from None
