"""Turn image files into batches: layouts, formats, masks, splits, augmentation, data sets."""
