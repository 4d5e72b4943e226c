"""Programs for those who work on the package: proofs, machine code, the GPU's turn, tables."""
