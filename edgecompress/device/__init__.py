"""What a bundle takes to the device: scripts that need Python 3.9, numpy and ONNX Runtime, and a C++ example.

The files of this folder are copied into every bundle as they stand here, so what the tests check is what runs there.
"""
