"""The teacher cache: stored outputs of a teacher for the samples and views of a data set."""
