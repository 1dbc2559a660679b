"""Export Hugging Face causal LMs to Core ML `.pte` files and measure them off-device."""
