"""ONNX files in, measurements out: latency with intervals, memory, operators, the verdict."""
