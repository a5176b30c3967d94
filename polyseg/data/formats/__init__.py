"""Read and write image files: PNG, JPEG, TIFF, NIfTI, DICOM."""
