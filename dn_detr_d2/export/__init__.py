"""A trained detector as a file that runs without this package: ONNX, torch.export, AOTInductor."""
