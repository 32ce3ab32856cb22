"""Files to deploy a trained network: ONNX, torch.export, and a folder for the Hugging Face Hub."""
