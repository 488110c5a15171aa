"""The sweep of a trained net: accuracy and cost of each instance, as table, plot and artefact."""
