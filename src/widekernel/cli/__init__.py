"""The command line: it reads arguments, owns the console and leaves the work to the library."""
