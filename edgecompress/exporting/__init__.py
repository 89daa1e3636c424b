"""PyTorch in, ONNX out, with the proof that both answer alike."""
