"""A few minutes on a machine with a GPU and no network: checks, benchmarks and tuning, one after the other.

    python3 benchmarks/gpu_session --out FOLDER --minutes 9 --wheels build/offline-bundle

The program that starts, watches and records the stages needs only Python's standard library.
"""
