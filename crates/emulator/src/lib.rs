//! Runs kernels of the kernel language on the CPU, with every check that a GPU lacks.
