"""MODEL IN: a checkpoint anywhere fsspec reaches, read by ranges, one decoder block at a time.

location    from what the user wrote to a URL; listing and ranged reads
tensors     what a stored tensor is: its bytes, shape and dtype
safetensors the header of a safetensors file, checked in full before it is believed
gguf        a GGUF file as transformers would load it, one tensor at a time
skeleton    the model class without weights, and how stored names map onto its names
source      Checkpoint and open_checkpoint: all of the above behind one object
graph       the decoder blocks, their linear layers and which of these share an input
decoder     the model with only the weights asked for
documents   text and token files as a stream of documents
tokens      calibration and evaluation windows
"""
