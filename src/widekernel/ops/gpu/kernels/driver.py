"""Whether Triton can launch anything on this machine."""

from functools import cache

from triton.runtime import driver


@cache
def obstacle() -> str:
    """Return why Triton cannot launch kernels on the GPU; "" if it can.

    When Triton is first used, it compiles its launcher from C, which takes about a second, and caches it on disk.
    """
    try:
        driver.active.utils  # noqa: B018 - the first access builds it
    except Exception as error:
        return (
            f"Triton cannot build its kernel launcher ({type(error).__name__}: {error}): it needs a C compiler (gcc, clang "
            "or the one that the variable CC names), Python's header files, and the driver's libcuda.so.1"
        )
    return ""
