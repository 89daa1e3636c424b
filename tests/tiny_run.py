"""The least that a whole run can be made of, for scripts that make one many times."""

RECIPE = """
data: {name: digits, max_train_samples: 64}
model: {name: resnet8, arguments: {width: 8}, preprocessing: {input_size: 16}}
stages:
  - {id: dense, kind: train, epochs: 1, warmup_epochs: 0}
  - {id: int8, kind: quantize, effort: fast, placement: full, calibration: {samples: 16}}
"""
# With nothing to choose by measuring, so that a run gives the same bytes again.
TARGET = "name: here\narchitecture: {architecture}\nint8: {{conv_kernels: symmetric}}\n"
