"""The operators in Triton. Imported only once one of them is asked for."""
