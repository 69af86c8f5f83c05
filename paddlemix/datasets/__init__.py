"""JSON -> Sample and Example -> Batch: files, images, mixing and collation, in numpy and PIL."""
