"""The operators in CUDA C, through CuPy. Imported only once one of them is asked for."""
