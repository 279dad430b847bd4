"""What a run leaves to be read: TensorBoard, JSON lines, figures."""
