"""Updates kept inside, or outside, of subspaces of a layer's inputs."""
