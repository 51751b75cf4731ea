"""The converter: Hugging Face models to GGUF files of sign matrices. Start at `dbf2gguf.convert.convert`."""
