"""Why a test may be skipped: for what the machine is, never for what could have been installed."""

ALLOWED = frozenset(
    {
        "needs a CUDA device",
        "there is a CUDA device",
        "no user namespaces here",
        "not Linux",
    }
)
"""Every reason there is. `make install` and `make test` install all that the tests need, so that a
package, a plugin, a kernel or a program that is missing is a failure."""


def fault(reason: str) -> str | None:
    """What is wrong with a skip for this reason; None if it is allowed."""
    if reason.removeprefix("Skipped: ") in ALLOWED:
        return None
    return (
        f"skipped ({reason}): tests may be skipped for the reasons in tests/helpers/skips.py only; "
        "what is missing belongs to `make install`"
    )
