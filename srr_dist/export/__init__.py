"""A finished model: the quantized base, its adapter, the merged form, and how they are described and checked."""
