"""Where images come from: sets that are written once as TFDS data sets, TFDS data sets, and image folders."""
