"""From a folder of images to batches: pairs, readers, splits, augmentation, phantoms."""
