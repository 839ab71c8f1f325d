"""The model around the layer, which belongs to no library: image flows, their steps, images, sampling, training."""
