"""The library-independent model around the layer: image flows, their steps, images, sampling, training."""
