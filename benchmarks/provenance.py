"""What a benchmark was measured on."""

import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version


def provenance(*packages: str) -> dict[str, str | None]:
    """The device, the day, the commit, and the version of each package, None where it is not installed."""
    import torch  # here, not above: a peer may want to be imported before it

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    versions = {package: _version(package) for package in packages}
    return {"device": device, "date": date.today().isoformat(), "commit": commit.stdout.strip(), **versions}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
