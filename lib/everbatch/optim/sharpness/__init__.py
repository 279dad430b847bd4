"""The sharpness family: gradients taken at, or against, nearby weights."""
