"""Pure tensor functions: rotation and partial attention; no documents, no models."""
