"""The version of this project, and of what a report of a problem should name."""

import importlib.metadata
import platform

import numpy as np

VERSION = "1.0.0"


def describe_versions():
    """Return lines with the versions of this project, Python, NumPy and its BLAS, numba and JAX.

    Packages are looked up, not imported.
    """
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return "\n".join(
        [
            f"gpt2-numpy {VERSION}",
            f"Python {platform.python_version()}",
            f"NumPy {np.__version__}, BLAS {blas.get('name')} {blas.get('version')}",
            f"numba {version_of('numba')}",
            f"JAX {version_of('jax')}",
        ]
    )


def version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
