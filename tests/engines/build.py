"""Build stable-diffusion.cpp beside this Python: ``python -m tests.engines.build``.

The package index has its source, in the Python binding's own archive. Of it come `sd-cli`, its command line, and
`denoise` (sdcpp/denoise.cpp), one call of its denoiser: the binding draws whole pictures only.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "stable-diffusion-cpp-python"
VERSION = "0.4.7"
PROGRAMS = ("denoise", "sd-cli")
HERE = Path(__file__).parent


def build(programs: Path) -> None:
    """Fetch the archive, build, and put the programs into a folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--no-binary", PACKAGE, "-d", folder, f"{PACKAGE}=={VERSION}"], check=True)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        (source,) = folder.glob("*/vendor/stable-diffusion.cpp")
        made = folder / "build"
        subprocess.run(["cmake", "-G", "Ninja", "-S", HERE / "sdcpp", "-B", made, f"-DSDCPP={source}"], check=True)
        subprocess.run(["cmake", "--build", made, "--target", *PROGRAMS], check=True)
        for program in PROGRAMS:
            (found,) = made.glob(f"**/bin/{program}") if program != "denoise" else made.glob(program)
            shutil.copy2(found, programs / program)


if __name__ == "__main__":
    build(Path(sys.executable).parent)
