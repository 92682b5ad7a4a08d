"""`python -m compressor`, the same as the command `compressor`: what `torchrun -m compressor` starts."""

from __future__ import annotations

from compressor.cli import main

if __name__ == "__main__":
    main()
