#!/usr/bin/env python3
"""Puts Highway's source into a folder, from the package registry alone.

Debian 12 carries Highway 1.0.3, which lacks the bfloat16 dot targets; numpy's source package carries 1.3. pip insists on asking a
source package's build backend for metadata before it hands the file over, which would configure all of numpy: a stand-in backend
answers instead.

    scripts/fetch_highway.py .deps/highway
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

NUMPY = "2.4.6"
INSIDE = f"numpy-{NUMPY}/numpy/_core/src/highway/"

BACKEND = f"""
import pathlib

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "numpy-{NUMPY}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: numpy\\nVersion: {NUMPY}\\n")
    return info.name
"""


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    target = pathlib.Path(sys.argv[1]).resolve()
    if (target / "hwy" / "highway.h").exists():
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        (work / "mesonpy.py").write_text(BACKEND)
        environment = dict(os.environ, PYTHONPATH=str(work))
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--no-build-isolation", "--no-binary", "numpy", "--dest", str(work), f"numpy=={NUMPY}"]
        if subprocess.run(pip, env=environment).returncode != 0:
            print(f"fetch_highway: pip could not download numpy {NUMPY}'s source package", file=sys.stderr)
            return 1
        unpacked = work / "highway"
        with tarfile.open(work / f"numpy-{NUMPY}.tar.gz") as archive:
            for member in archive.getmembers():
                if not member.isfile() or not member.name.startswith(INSIDE):
                    continue
                path = unpacked / member.name.removeprefix(INSIDE)
                if not path.resolve().is_relative_to(unpacked.resolve()):
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.extractfile(member) as source, open(path, "wb") as out:
                    shutil.copyfileobj(source, out)
        if not (unpacked / "hwy" / "highway.h").exists():
            print(f"fetch_highway: numpy {NUMPY}'s source package holds no {INSIDE}", file=sys.stderr)
            return 1
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        shutil.move(unpacked, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
