"""Other programs' formats, in and out: Hugging Face folders, the hub, GGUF."""
