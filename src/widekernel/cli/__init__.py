"""The command line, which parses arguments and writes to the console; the library does the work."""
