"""fastattn inside other libraries; importing one of these modules imports that library."""

from importlib import metadata

OLDEST_TRANSFORMERS = "5.23"  # as in pyproject.toml; older ones make masks in another way


def _check_transformers() -> None:
    try:
        found = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return  # the modules that need it say so
    from packaging.version import Version  # comes with transformers

    if Version(found).release < Version(OLDEST_TRANSFORMERS).release:
        raise ImportError(
            f"fastattn.integrations needs transformers {OLDEST_TRANSFORMERS} or newer, but {found} is installed: "
            "pip install --upgrade 'fastattn[hf]'"
        )


_check_transformers()
