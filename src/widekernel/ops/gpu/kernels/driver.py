"""Whether Triton can launch anything on this machine."""

from functools import cache

from triton.runtime import driver


@cache
def obstacle() -> str:
    """Say why Triton cannot launch kernels on the GPU, "" if it can.

    Triton builds what launches kernels out of C when it is first used, about a second long, and keeps it on disk.
    """
    try:
        driver.active.utils  # noqa: B018 - built where it is first asked for
    except Exception as error:
        return (
            f"Triton cannot build what launches kernels ({type(error).__name__}: {error}): it needs a C compiler, gcc or "
            "clang or what the variable CC names, Python's header files, and the driver's libcuda.so.1"
        )
    return ""
