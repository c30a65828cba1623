"""Minutes on a machine with a GPU and no network, made the most of: checks, tables and tuning, one after the other.

    python3 benchmarks/gpu_session --out FOLDER --minutes 9 --wheels build/offline-bundle

What starts, watches and records the stages needs nothing but Python's own library.
"""
