"""Finds liblatte_ops.so, the shared library of latte's operators, and loads it into torch."""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path

import torch

LIBRARY = "liblatte_ops.so"
BUILT_AGAINST = "liblatte_ops.torch.txt"
VARIABLE = "LATTE_OPS_LIBRARY"


def candidates() -> list[Path]:
    """Where the library may be, best first: the package's folder, the installed package of an editable install, the checkout's
    build/.
    """
    package = Path(__file__).resolve().parent
    found = [package / LIBRARY, Path(sysconfig.get_path("platlib")) / "latte" / LIBRARY]
    checkout = package.parent.parent
    if (checkout / "CMakeLists.txt").is_file():
        found.append(checkout / "build" / LIBRARY)
    return list(dict.fromkeys(found))


def find_library() -> Path:
    """The library's path: $LATTE_OPS_LIBRARY where that is set, else the first candidate that exists.

    Raises:
        ImportError: there is none; the text says where it was looked for and how to get it.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_file():
            raise ImportError(f"{VARIABLE} names {named}, which is not a file")
        return Path(named)
    for path in candidates():
        if path.is_file():
            return path
    looked = "\n  ".join(str(path) for path in candidates())
    raise ImportError(
        f"latte's operators are missing: no {LIBRARY} at\n  {looked}\n"
        "Install the package (pip install . --no-build-isolation), or in a checkout build them (cmake --preset release && "
        f"cmake --build build --target latte_ops), or name the library in the environment variable {VARIABLE}."
    )


def _release(version: str) -> tuple[str, ...]:
    """Major and minor number; libtorch keeps its binary interface within those."""
    return tuple(re.findall(r"\d+", version)[:2])


def load_library() -> Path:
    """Loads the library once, which registers torch.ops.latte, and returns its path.

    Raises:
        ImportError: the library is missing, was built against another torch, or can't be loaded.
    """
    path = find_library()
    note = path.with_name(BUILT_AGAINST)
    built = note.read_text(encoding="utf-8", errors="replace").strip() if note.is_file() else ""
    again = "Build latte again with the installed torch: pip install . --no-build-isolation --force-reinstall --no-deps"
    if built and _release(built) != _release(torch.__version__):
        raise ImportError(f"{path} was built against torch {built}, but torch {torch.__version__} is installed. {again}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        against = f"torch {built}" if built else "an unknown torch"
        raise ImportError(
            f"{path} (built against {against}) can't be loaded into torch {torch.__version__}: {error}\n{again}"
        ) from error
    return path
