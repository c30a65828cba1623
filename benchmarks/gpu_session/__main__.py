"""The program `python3 benchmarks/gpu_session`, for any folder and any Python with PyTorch."""

import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - the Python of the machine may be older
    sys.exit("widekernel needs Python 3.10 or newer, and this is %d.%d: run it with another one" % sys.version_info[:2])  # noqa: UP031

sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.gpu_session.session import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
