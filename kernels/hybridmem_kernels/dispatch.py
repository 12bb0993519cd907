"""Which implementation of an operator runs."""

BACKENDS = ("torch", "reference")


def choose_backend(backend: str | None) -> str:
    """The backend asked for, or the fastest there is: "torch".

    Raises:
        ValueError: a backend that does not exist.
    """
    if backend is None:
        return BACKENDS[0]
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} does not exist; choose one of {', '.join(BACKENDS)}")
    return backend
