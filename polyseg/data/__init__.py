"""From image files to batches: layouts, formats, masks, splits, augmentation, data sets."""
