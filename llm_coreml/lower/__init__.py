"""From a decoder to the bytes of an ExecuTorch program."""
