"""Causal LMs: loaded, sharded, asked; the hub they come from and the hardware they run on."""
