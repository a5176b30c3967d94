"""Find the images and masks of a data set by how its folders and files are named."""
