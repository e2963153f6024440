"""Causal LMs: loading, sharding and generation; the hub they come from and the hardware they run on."""
