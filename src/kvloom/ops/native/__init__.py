"""The compiled executor: kernels behind a plain C interface, called through ctypes."""
