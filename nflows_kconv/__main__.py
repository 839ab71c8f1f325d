"""`python -m nflows_kconv` prints what is installed, and which backend runs here and why."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from nflows_kconv.backends import available_backends, selected_backends
from nflows_kconv.backends.cuda import cache


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Prints the report."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    facts = {name: _version(name) for name in ("nflows-kconv", "torch", "cuda-bindings", "nflows", "normflows")}
    facts["torch"] = torch.__version__  # with the device it was built for
    facts["Python"] = platform.python_version()
    facts["system"] = platform.platform()
    facts["CPU"] = torch.backends.cpu.get_cpu_capability()
    facts["accelerator"] = "none" if accelerator is None else accelerator.type
    facts["kernel cache"] = str(cache.directory() or "none")
    for name, value in facts.items():
        print(f"{name + ':':<15}{value}")
    print("\nbackends")
    for backend in available_backends().values():
        print(f"  {backend}")
    print("\npicked")
    for device, name in selected_backends().items():
        print(f"  {device} tensors run on {name}")


if __name__ == "__main__":
    main()
