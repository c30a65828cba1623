"""The kernels. Imported only when they are to run, because Triton takes a while to import and may not be there."""
