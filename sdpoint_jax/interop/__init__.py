"""Other formats: names and files of PyTorch, ONNX, StableHLO, safetensors."""
